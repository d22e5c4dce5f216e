"""What methods that route have in common: whose an example is, what a gate may look at, what is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmerge import ClientUpdate, MergeContext
from fedmerge.aggregators.routed import chosen_modules, owners, server_batches, trained_names, widths_seen
from fedmerge.errors import InvalidOption, UnknownName


def test_an_example_is_whose_model_has_the_least_loss_on_it():
    model = nn.Linear(2, 2, bias=False)
    states = [torch.tensor([[5.0, 0.0], [-5.0, 0.0]]), torch.tensor([[0.0, 5.0], [0.0, -5.0]])]
    updates = [ClientUpdate(i, {"weight": one}) for i, one in enumerate(states)]
    x, y = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [-1.0, 2.0]]), torch.tensor([0, 0, 0, 1])
    found = owners(model, dict(model.state_dict()), updates, [(x[:1], y[:1]), (x[1:], y[1:])], None)
    assert [one.tolist() for one in found] == [[0], [1, 0, 0]]  # of equals, as the third, the first


class Attends(nn.Module):
    """Attention, whose projection is never called as a module."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0].mean(1))


def test_what_is_never_called_gets_no_gate():
    model = Attends().eval()
    names = chosen_modules(model, "", [name for name, _ in model.named_parameters()])
    assert names == ["unused", "head"]
    assert widths_seen(model, names, torch.zeros(2, 3, 4)) == {"head": 4}
    with pytest.raises(InvalidOption, match="none of"):
        widths_seen(model, ["unused"], torch.zeros(2, 3, 4))


def test_a_chosen_block_holds_what_lies_within_it():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    names = [name for name, _ in model.named_parameters()]
    assert chosen_modules(model, "0* 1", names) == ["0", "1"]
    with pytest.raises(UnknownName, match="'head'"):
        chosen_modules(model, "head", names)
    with pytest.raises(InvalidOption, match="no trained linear layer"):
        chosen_modules(nn.Sequential(nn.Conv1d(1, 1, 1)), "", ["0.weight"])


def test_frozen_parameters_that_nobody_moved_have_no_experts():
    sent = [ClientUpdate(i, {"a": torch.zeros(1), "b": torch.tensor([float(i)])}) for i in range(2)]
    assert trained_names(sent, MergeContext(frozen=frozenset(("a", "b")))) == ["b"]
    assert trained_names(sent, MergeContext()) == ["a", "b"]


def test_data_without_labels_are_refused_where_they_teach():
    inputs = torch.zeros(3, 2)
    assert server_batches(MergeContext(data=[inputs]), "A method", labelled=False)[0][1].shape == (3,)
    for data, told in (([inputs], "learns from labels"), (None, "learns from labels")):
        with pytest.raises(InvalidOption, match=told):
            server_batches(MergeContext(data=data), "A method", labelled=True)
    with pytest.raises(InvalidOption, match="server_examples"):
        server_batches(MergeContext(), "A method", labelled=False)
