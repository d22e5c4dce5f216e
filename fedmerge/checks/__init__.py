"""What every update and model has to be, checked once before any method runs."""
