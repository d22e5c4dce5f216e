"""The default models learn real digits with plain SGD, as clients train them."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from fedmerge.models import build_model


@pytest.mark.parametrize(
    ("name", "epochs", "least"), [("logistic", 5, 0.85), ("mlp", 8, 0.93), ("lenet", 12, 0.95), ("vit", 5, 0.85)]
)
def test_digits(name: str, epochs: int, least: float) -> None:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[:1400], order[1400:]
    model = build_model(name, (1, 8, 8), 10, seed=0)
    for epoch in range(epochs):
        for batch in train[torch.randperm(len(train), generator=generator)].split(32):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            with torch.no_grad():
                gradients = torch.autograd.grad(loss, list(model.parameters()))
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    # The rate falls to zero, so that the last step does not decide the outcome.
                    parameter.sub_(0.2 * (1 - epoch / epochs) * gradient)
    accuracy = (model(images[test]).argmax(dim=-1) == labels[test]).float().mean()
    assert accuracy > least
