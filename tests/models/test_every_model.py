"""What holds for each registered model: one table of narrow models on the inputs that they must take."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.models import build_model, model_names, model_options

DIGITS, MNIST, CIFAR = (1, 8, 8), (1, 28, 28), (3, 32, 32)


@dataclass(frozen=True)
class Case:
    """A narrow model and one input shape."""

    name: str
    input_shape: tuple[int, ...]
    options: dict[str, object] = field(default_factory=dict)
    label: str = ""

    def build(self, seed: int = 0) -> nn.Module:
        return build_model(self.name, self.input_shape, 7, seed=seed, **self.options)

    def inputs(self, batch: int = 3) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        if self.name == "char_lstm":
            return torch.randint(7, (batch, *self.input_shape), generator=generator)
        return torch.randn(batch, *self.input_shape, generator=generator)

    def __str__(self) -> str:
        return f"{self.name}{self.label}-{'x'.join(map(str, self.input_shape))}"


VGG = {"channels": (4, 4, 8, 8, 8, 8), "hidden": (16, 16)}
RESNET, GROUP = {"width": 4}, {"width": 4, "norm": "group"}
VIT = {"dim": 8, "depth": 2, "heads": 2}
CASES = [
    *(Case("logistic", shape) for shape in (DIGITS, MNIST, CIFAR, (5,))),
    *(Case("mlp", shape, {"hidden": (8, 6)}) for shape in (DIGITS, MNIST, CIFAR, (5,))),
    *(Case("lenet", shape, {"hidden": (12, 8)}) for shape in (DIGITS, MNIST, CIFAR, (2, 12, 30), (1, 4, 4))),
    *(Case("vgg9", shape, VGG) for shape in (DIGITS, MNIST, CIFAR, (1, 8, 17))),
    *(Case("resnet8", shape, RESNET) for shape in (DIGITS, MNIST, CIFAR, (1, 5, 9))),
    *(Case("resnet8", shape, GROUP, "-group") for shape in (DIGITS, MNIST, CIFAR)),
    *(Case("resnet20", shape, RESNET) for shape in (DIGITS, CIFAR)),
    *(Case("resnet20", shape, GROUP, "-group") for shape in (DIGITS, CIFAR)),
    Case("char_lstm", (9,), {"hidden": 6}),
    Case("char_lstm", (1,), {"hidden": 6, "layers": 1}),
    *(Case("vit", shape, VIT) for shape in (DIGITS, MNIST, CIFAR, (1, 4, 12))),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
EXTRA = {"efficientnet_lite0"}  # needs an extra, see test_efficientnet_lite0
# One input shape a model, for what does not depend on the shape.
FIRST = list({(case.name, case.label): case for case in reversed(CASES)}.values())
every_model = pytest.mark.parametrize("case", FIRST, ids=str)


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    logits = model(inputs)
    labels = torch.arange(logits[..., 0].numel()) % 7
    return F.cross_entropy(logits.flatten(0, -2), labels)


def test_the_table_has_every_model() -> None:
    assert {case.name for case in CASES} == set(model_names()) - EXTRA


@every_case
def test_logits_have_the_class_axis_last(case: Case) -> None:
    logits = case.build()(case.inputs())
    expected = (3, *case.input_shape, 7) if case.name == "char_lstm" else (3, 7)
    assert logits.shape == expected
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


@every_case
def test_logits_are_no_probabilities(case: Case) -> None:
    logits = case.build().eval()(case.inputs())
    assert not torch.allclose(logits.exp().sum(-1), torch.ones(()), atol=1e-3)
    assert not torch.allclose(logits.sum(-1), torch.ones(()), atol=1e-3)


@every_case
def test_each_example_is_answered_on_its_own(case: Case) -> None:
    model, inputs = case.build().eval(), case.inputs()
    torch.testing.assert_close(model(inputs)[1:2], model(inputs[1:2]), atol=1e-5, rtol=1e-4)


@every_case
def test_a_batch_of_one_example_trains(case: Case) -> None:
    model = case.build().train()
    assert torch.isfinite(model(case.inputs(batch=1))).all()


@every_case
def test_gradient_reaches_every_parameter(case: Case) -> None:
    model = case.build()
    loss_of(model, case.inputs(batch=16)).backward()
    # What rounding leaves of a gradient that is zero in exact arithmetic is about 1e-9.
    dead = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7]
    if case.name == "char_lstm" and case.input_shape == (1,):
        dead.remove("lstm.weight_hh_l0")  # the first step's state is zero
    assert dead == []


@every_case
def test_a_gradient_step_lowers_the_loss(case: Case) -> None:
    model, inputs = case.build(), case.inputs(batch=16)
    before = loss_of(model, inputs)
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.01 * parameter.grad)
    assert loss_of(model, inputs) < before


@every_model
def test_same_seed_same_bits_and_other_seed_others(case: Case) -> None:
    one, same, other = (case.build(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    weights = [name for name in one if one[name].dim() > 1]
    assert weights
    assert not any(torch.equal(one[name], other[name]) for name in weights)


@every_model
def test_global_random_state_is_neither_used_nor_changed(case: Case) -> None:
    torch.manual_seed(1)
    first, state = case.build().state_dict(), torch.get_rng_state()
    assert torch.equal(state, torch.manual_seed(1).get_state())
    torch.manual_seed(2)
    second = case.build().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_model
@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm:UserWarning")  # torch on its own LSTM
def test_torch_export_gives_the_same_function_under_the_same_names(case: Case) -> None:
    model, inputs = case.build().eval(), case.inputs()
    program = torch.export.export(model, (inputs,))
    torch.testing.assert_close(program.module()(inputs), model(inputs))
    assert set(program.state_dict) == set(model.state_dict())


@every_model
def test_a_copy_and_its_state_dict_give_the_same_function(case: Case) -> None:
    model, inputs = case.build(0).eval(), case.inputs()
    other = case.build(1).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(inputs), model(inputs))
    assert torch.equal(copy.deepcopy(model)(inputs), model(inputs))


@every_model
def test_the_weights_are_shared_by_nobody(case: Case) -> None:
    one, two = case.build(), case.build()
    pointers = {p.data_ptr() for p in one.parameters()}
    assert len(pointers) == len(list(one.parameters()))
    assert pointers.isdisjoint(p.data_ptr() for p in two.parameters())


@pytest.mark.parametrize("name", [name for name in model_names() if name not in EXTRA])
def test_listed_defaults_are_the_defaults(name: str) -> None:
    shape = (9,) if name == "char_lstm" else CIFAR
    plain = build_model(name, shape, 7, seed=0).state_dict()
    spelled = build_model(name, shape, 7, seed=0, **model_options(name)).state_dict()
    assert list(plain) == list(spelled)
    assert all(torch.equal(plain[key], spelled[key]) for key in plain)
