"""Draw what matching neurons does to two networks that trained apart: python plots/matching.py [OUT].

Two small networks learn scikit-learn's digits from different beginnings (seconds, no records needed). Half-way
between them as trained there is a hill of loss; once rebasin has put the neurons of one in the order of the other,
most of it is gone.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import fedmerge
from fedmerge.data import load_dataset
from fedmerge.diagnostics import barrier, matching_costs
from fedmerge.matching.weight_costs import match_weights
from fedmerge.models import build_model
from fedmerge.permutations import trace
from fedmerge.plotting import plot_matching
from fedmerge.training import LocalTraining, evaluate, train

HERE = Path(__file__).parent


def trained(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    model = build_model("mlp", (1, 8, 8), 10, seed=seed, hidden=[128, 128])
    train(model, x, y, LocalTraining(optimizer="adam", learning_rate=1e-3, epochs=40), seed=seed, client=0, round=1)
    return model


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    digits = load_dataset("digits")
    a, b = (trained(digits.train_x, digits.train_y, seed) for seed in (0, 1))
    example, tests = digits.train_x[:2], [(digits.test_x, digits.test_y)]

    spec = trace(a, example)
    perms, _ = match_weights(spec, a.state_dict(), b.state_dict(), generator=torch.Generator().manual_seed(0))
    moved = build_model("mlp", (1, 8, 8), 10, seed=1, hidden=[128, 128])
    moved.load_state_dict(spec.apply(b.state_dict(), perms))

    lines = {"as trained": barrier(a, b, tests, points=21), "matched": barrier(a, moved, tests, points=21)}
    for name, line in lines.items():
        print(f"{name}: barrier {line.height:.3f}")
    for method in ("fedavg", "rebasin"):
        merged = fedmerge.merge([a, b], method, example=example)
        print(f"{method}: test accuracy {evaluate(merged, *tests[0])[1]:.3f}")
    print(
        plot_matching(
            lines,
            matching_costs(spec, a.state_dict(), b.state_dict(), perms),
            out / "matching.png" if out.is_dir() else out,
        )
    )


if __name__ == "__main__":
    main()
