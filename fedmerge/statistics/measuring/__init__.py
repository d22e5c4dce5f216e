"""How statistics are measured: taps on layers, layers as matrices, gradients example by example."""
