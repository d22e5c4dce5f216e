"""Models that people have: casts, precisions of their own, inputs and outputs of any form, modes."""

from __future__ import annotations

import copy
from collections import UserDict, namedtuple
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge import ModelError
from fedmerge.inputs import call
from fedmerge.permutations import trace, verify
from fedmerge.permutations.running import few_rows


class Net(nn.Module):
    """Two hidden layers of 16 and 12; what goes into it is for subclasses to say."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def run(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    def forward(self, x):
        return self.run(x)


def sizes(model, example):
    return sorted(group.size for group in trace(model, example).groups)


class Norm(nn.Module):
    """The norm of LLaMA as transformers has it: in float32, whatever goes in."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        kind = x.dtype
        x = x.to(torch.float32)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(kind)


def test_casts_there_and_back_pin_nothing():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 32), Norm(32), nn.Linear(32, 3)), torch.randn(16, 8)
    spec = trace(model, x)
    assert [(g.name, g.size) for g in spec.groups] == [("0.weight", 32)]
    other = copy.deepcopy(model)
    other.load_state_dict(spec.apply(model.state_dict(), spec.random(torch.Generator().manual_seed(1))))
    merged = fedmerge.merge([model, other], "rebasin", example=x)
    assert torch.allclose(merged(x), model(x), atol=1e-5)


class HeadInFloat32(Net):
    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))).float())


class Mixed(Net):
    """Its first layer in bfloat16."""

    def __init__(self):
        super().__init__()
        self.a = self.a.bfloat16()

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x.bfloat16())).float())))


class ConstantInFloat32(Net):
    """A matrix that no cast of the model reaches."""

    def __init__(self):
        super().__init__()
        self.scale = torch.diag(torch.rand(8) + 0.5)

    def forward(self, x):
        return self.run(x @ self.scale)


class Autocast(Net):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = torch.relu(self.b(torch.relu(self.a(x))))
        return self.c(hidden.float())


@pytest.mark.parametrize("kind", [HeadInFloat32, Mixed, ConstantInFloat32, Autocast])
def test_a_model_with_a_precision_of_its_own_is_proved_in_one_that_it_takes(kind):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(4, 8)
    assert sizes(model, x) == [12, 16]
    assert verify(trace(model, x), model, x) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_in_another_precision_throughout(dtype):
    torch.manual_seed(0)
    assert sizes(Net().to(dtype), torch.randn(4, 8, dtype=dtype)) == [12, 16]


@pytest.mark.parametrize("kind", [HeadInFloat32, Mixed])
def test_a_mistake_is_caught_in_any_precision(kind):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(4, 8)
    spec = trace(model, x)
    wrong = tuple(replace(group, sites=group.sites[:-1]) for group in spec.groups)
    with pytest.raises(ModelError, match="re-ordering neurons changes the outputs"):
        verify(replace(spec, groups=wrong), model, x)


class OfOne(Net):
    """Takes what its function picks out of one argument."""

    def __init__(self, pick):
        super().__init__()
        self.pick = pick

    def forward(self, batch):
        return self.run(self.pick(batch))


class OfMany(Net):
    def forward(self, x, scale=None, mode="plain", times=1, *, extra=None):
        if mode == "repeated":
            x = x * times
        if scale is not None:
            x = x * scale
        return self.run(x if extra is None else x + extra["shift"][0])


@dataclass(frozen=True)
class Batch:
    x: Any
    number: int = 0


Named = namedtuple("Named", "x other")


def x():
    return torch.randn(4, 8)


INPUTS = {
    "dict": (OfOne(lambda b: b["n"] + b["c"]), lambda: {"n": x(), "c": x()}),
    "dict in a tuple": (OfOne(lambda b: b["n"] + b["c"]), lambda: ({"n": x(), "c": x()},)),
    "nest": (OfOne(lambda b: b["n"][0] + b["c"]["d"][1]), lambda: {"n": [x()], "c": {"d": (None, x())}}),
    "list": (OfOne(lambda b: b[0] + b[1]), lambda: [x(), x()]),
    "tuple as one": (OfOne(lambda b: b[0] + b[1]), lambda: (x(), x())),
    "named tuple": (OfOne(lambda b: b.x), lambda: Named(x(), 3)),
    "dataclass": (OfOne(lambda b: b.x), lambda: Batch(x())),
    "namespace": (OfOne(lambda b: b.x), lambda: SimpleNamespace(x=x(), name="train")),
    "mapping of its own": (OfOne(lambda b: b["n"]), lambda: UserDict(n=x())),
    "keywords": (OfMany(), lambda: {"x": x(), "scale": torch.rand(4, 1)}),
    "keywords of another mapping": (OfMany(), lambda: UserDict(x=x(), mode="repeated", times=2)),
    "arguments": (OfMany(), lambda: (x(), torch.rand(4, 1))),
    "None, text and numbers": (OfMany(), lambda: (x(), None, "repeated", 3)),
    "arguments and keywords": (OfMany(), lambda: (x(), {"extra": {"shift": [torch.rand(4, 1)]}})),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_any_form(name):
    torch.manual_seed(0)
    model, make = INPUTS[name]
    example = make()
    assert sizes(model, example) == [12, 16]
    other = copy.deepcopy(model)
    spec = trace(model, example)
    other.load_state_dict(spec.apply(model.state_dict(), spec.random(torch.Generator().manual_seed(1))))
    merged = fedmerge.merge([model, other], "rebasin", example=example)
    assert torch.allclose(call(merged, example), call(model, example), atol=1e-5)


@pytest.mark.parametrize("method", ["rebasin", "otfusion"])
def test_activations_are_heard_on_inputs_of_any_form(method):
    torch.manual_seed(0)
    model = OfOne(lambda b: b["n"] + b["c"][0])
    batches = [({"n": torch.randn(20, 8), "c": [torch.randn(20, 8)]}, torch.zeros(20)) for _ in range(2)]
    spec = trace(model, batches[0][0])
    other = copy.deepcopy(model)
    other.load_state_dict(spec.apply(model.state_dict(), spec.random(torch.Generator().manual_seed(1))))
    merged = fedmerge.merge([model, other], method, ground="activations", examples=30, data=batches)
    assert torch.allclose(merged(batches[0][0]), model(batches[0][0]), atol=1e-5)


class Graph(Net):
    def forward(self, x, neighbours):
        return self.c(torch.relu(self.b(neighbours @ torch.relu(neighbours @ self.a(x)))))


class OneExample(nn.Module):
    """Takes one example, whose first axis is that of its nine parts."""

    def __init__(self):
        super().__init__()
        self.place, self.a = nn.Parameter(torch.randn(9, 16)), nn.Linear(8, 16)
        self.b, self.c = nn.Linear(9 * 16, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x) + self.place).flatten())))


class NormedTogether(Net):
    """Each batch is normalised by itself."""

    def forward(self, x):
        hidden = torch.relu(self.a(x))
        return self.c(torch.relu(self.b((hidden - hidden.mean(0)) / (hidden.std(0) + 0.1))))


WHOLE = {
    "graph": (Graph(), lambda: (torch.randn(7, 8), torch.rand(7, 7))),
    "one example": (OneExample(), lambda: torch.randn(9, 8)),
    "normed together": (NormedTogether(), lambda: torch.randn(6, 8)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_an_example_whose_first_axis_is_no_batch_is_used_whole(name):
    torch.manual_seed(0)
    model, make = WHOLE[name]
    example = make()
    assert sizes(model, example) == [12, 16]
    assert few_rows(copy.deepcopy(model).eval(), example) is example


def test_of_a_batch_two_rows_are_used_and_masks_stay_whole():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)

        def forward(self, x, mask):
            return self.layer(x, mask)

    torch.manual_seed(0)
    example = torch.randn(6, 7, 16), torch.full((7, 7), -torch.inf).triu(1)
    rows, mask = few_rows(Masked().eval(), example)
    assert rows.shape == (2, 7, 16)
    assert torch.equal(mask, example[1])
    # As many examples as positions: the mask would be cut too, so all stays as it is.
    example = torch.randn(7, 7, 16), example[1]
    assert few_rows(Masked().eval(), example) is example
    assert 24 in sizes(Masked(), example)


@dataclass
class Outputs:
    logits: Any = None
    loss: Any = None


OUTPUTS = {
    "dataclass": lambda y: Outputs(logits=y),
    "dict with None": lambda y: {"loss": None, "logits": y},
    "tuple": lambda y: (y, None, [y.sum(), "text"]),
    "a number beside": lambda y: {"logits": y, "zero": torch.zeros(()), "classes": y.argmax(-1)},
    "classes alone": lambda y: y.argmax(-1),
    "a distribution": lambda y: torch.distributions.Categorical(logits=y),
    "complex": lambda y: torch.complex(y, y.sin()),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("training", [False, True])
def test_outputs_of_any_form(name, training):
    class Model(Net):
        def forward(self, x):
            return OUTPUTS[name](self.run(x))

    torch.manual_seed(0)
    model = Model().train(training)
    assert sizes(model, x()) == [12, 16]
    assert model.training == training


def test_a_model_without_outputs_is_told():
    class Model(Net):
        def forward(self, x):
            self.run(x)

    with pytest.raises(ModelError, match="hold no tensor"):
        trace(Model(), x())


def test_an_example_that_the_model_does_not_take_is_told():
    with pytest.raises(ModelError, match="Net cannot be exported"):
        trace(Net(), torch.randn(4, 9))


class Logarithm(Net):
    def forward(self, x):
        return self.run(x.log())


class Categories(nn.Module):
    """Whole numbers in a column of floats."""

    def __init__(self):
        super().__init__()
        self.table, self.a, self.out = nn.Embedding(5, 12), nn.Linear(3, 12), nn.Linear(12, 2)

    def forward(self, x):
        return self.out(torch.relu(self.table(x[:, 0].long()) + self.a(x[:, 1:])))


def test_inputs_that_do_not_bear_noise_are_taken_as_they_are():
    torch.manual_seed(0)
    assert sizes(Logarithm(), torch.rand(4, 8) + 0.01) == [12, 16]
    columns = torch.cat([torch.randint(0, 5, (6, 1)).float(), torch.randn(6, 3)], 1)
    assert sizes(Categories(), columns) == [12]


class Blocks(Net):
    """Blocks of operators without gradient, and writing in place."""

    def forward(self, x):
        with torch.no_grad():
            hidden = torch.relu(self.a(x))
        steps = torch.zeros(len(x), 3, 12, dtype=x.dtype)
        steps[:, 1] = torch.relu(self.b(hidden))
        steps[:, 0] += 1
        return self.c(steps).mean(1)


class Parts(nn.Module):
    """Two layers written side by side."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(28, 3)

    def forward(self, x):
        both = torch.zeros(len(x), 28, dtype=x.dtype)
        both[:, :16] = torch.relu(self.a(x))
        both[:, 16:] = torch.relu(self.b(both[:, :16]))
        return self.c(both)


@pytest.mark.parametrize("kind", [Blocks, Parts])
def test_blocks_of_operators_and_writing_in_place(kind):
    torch.manual_seed(0)
    assert sizes(kind(), x()) == [12, 16]


def test_a_model_that_counts_its_runs_is_not_changed():
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("runs", torch.zeros(()))
            self.shapes = []

        def forward(self, x):
            self.runs += 1
            self.shapes.append(x.shape)
            return self.run(x) / self.runs

    torch.manual_seed(0)
    model = Counting()
    assert sizes(model, x()) == [12, 16]
    assert float(model.runs) == 0
    assert model.shapes == []
