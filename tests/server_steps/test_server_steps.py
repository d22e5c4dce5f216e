"""Server momentum and server Adam against NumPy over three rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmerge import ClientUpdate, InvalidOption, MergeContext
from fedmerge.merging import build_pipeline
from fedmerge.server_steps import ServerAdagrad, ServerAdam, ServerMomentum, ServerYogi

TARGETS = [np.array([1.0, -2.0, 0.1]), np.array([0.5, 3.0, 0.0]), np.array([2.0, 2.0, -1.0])]


def trajectory(method, options):
    pipeline, state, memory = build_pipeline(method, options), {"w": torch.zeros(3, dtype=torch.float64)}, {}
    for target in TARGETS:
        result = pipeline.merge([ClientUpdate(0, {"w": torch.tensor(target)})], MergeContext(base=state), memory)
        state, memory = result.state, result.memory
        yield state["w"].numpy()


def test_momentum():
    x, v = np.zeros(3), np.zeros(3)
    options = {"server_momentum": {"momentum": 0.7, "learning_rate": 0.5}}
    for target, got in zip(TARGETS, trajectory("fedavg+server_momentum", options), strict=True):
        v = 0.7 * v + (target - x)
        x = x + 0.5 * v
        np.testing.assert_allclose(got, x, rtol=1e-12)


def test_adam():
    x, m, tau = np.zeros(3), np.zeros(3), 0.05
    v = np.full(3, tau**2)
    options = {"server_adam": {"learning_rate": 0.3, "beta1": 0.8, "beta2": 0.95, "tau": tau}}
    for target, got in zip(TARGETS, trajectory("fedavg+server_adam", options), strict=True):
        delta = target - x
        m = 0.8 * m + 0.2 * delta
        v = 0.95 * v + 0.05 * delta**2
        x = x + 0.3 * m / (np.sqrt(v) + tau)
        np.testing.assert_allclose(got, x, rtol=1e-12)


def test_adam_in_flowers_form_corrects_its_bias_and_counts_from_two():
    x, m, v, tau = np.zeros(3), np.zeros(3), np.zeros(3), 0.05
    options = {"server_adam": {"learning_rate": 0.3, "beta1": 0.8, "beta2": 0.95, "tau": tau, "form": "flower"}}
    for i, (target, got) in enumerate(zip(TARGETS, trajectory("fedavg+server_adam", options), strict=True)):
        delta = target - x
        m = 0.8 * m + 0.2 * delta
        v = 0.95 * v + 0.05 * delta**2
        rate = 0.3 * np.sqrt(1 - 0.95 ** (i + 2)) / (1 - 0.8 ** (i + 2))
        x = x + rate * m / (np.sqrt(v) + tau)
        np.testing.assert_allclose(got, x, rtol=1e-12)


@pytest.mark.parametrize(("form", "start"), [("paper", 0.05**2), ("flower", 0.0)])
@pytest.mark.parametrize("usual", [False, True])
def test_yogi_and_adagrad(form, start, usual):
    yogi = {"learning_rate": 0.3, "beta1": 0.8, "beta2": 0.95, "tau": 0.05, "form": form}
    adagrad = {"learning_rate": 0.3, "beta1": 0.8, "tau": 0.05, "form": form}
    for name, options, second in (
        ("yogi", yogi, lambda v, square: v - 0.05 * square * np.sign(v - square)),
        ("adagrad", adagrad, lambda v, square: v + square),
    ):
        method, key = (f"fed{name}", f"fed{name}") if usual else (f"fedavg+server_{name}", f"server_{name}")
        x, m, v = np.zeros(3), np.zeros(3), np.full(3, start)
        for target, got in zip(TARGETS, trajectory(method, {key: options}), strict=True):
            delta = target - x
            m, v = 0.8 * m + 0.2 * delta, second(v, delta**2)
            x = x + 0.3 * m / (np.sqrt(v) + 0.05)
            np.testing.assert_allclose(got, x, rtol=1e-12)


@pytest.mark.parametrize("step", [ServerAdam, ServerYogi, ServerAdagrad])
def test_forms_are_two(step):
    with pytest.raises(InvalidOption, match='"paper" or "flower"'):
        step(form="mine")


def test_steps_are_taken_in_the_order_given_and_keep_apart_what_they_remember():
    pipeline = build_pipeline("fedavg+server_adam+server_momentum")
    first = pipeline.merge([ClientUpdate(0, {"w": torch.ones(2)})], MergeContext(base={"w": torch.zeros(2)}))
    assert set(first.memory) == {"step0/m/w", "step0/v/w", "step1/w"}


@pytest.mark.parametrize("step", [ServerMomentum(), ServerAdam()])
def test_a_step_leaves_its_inputs(step):
    base, merged = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    _, memory = step.step(base, merged, {})
    before = {name: t.clone() for name, t in memory.items()}
    step.step(base, merged, memory)
    assert base["w"].tolist() == [0, 0]
    assert merged["w"].tolist() == [1, 1]
    assert all(torch.equal(before[name], t) for name, t in memory.items())


def test_without_momentum_nothing_changes():
    assert ServerMomentum(0.0).step({"w": torch.ones(2)}, {"w": torch.full((2,), 3.0)}, {})[0]["w"].tolist() == [3, 3]


def test_a_step_needs_a_base():
    with pytest.raises(InvalidOption, match="base="):
        build_pipeline("fedavg+server_momentum").merge([ClientUpdate(0, {"w": torch.ones(2)})], MergeContext())


@pytest.mark.parametrize(
    "make", [lambda: ServerMomentum(1.0), lambda: ServerAdam(beta1=1.0), lambda: ServerAdam(tau=0)]
)
def test_options_out_of_range(make):
    with pytest.raises(InvalidOption, match=r"must lie in"):
        make()


def test_a_step_to_a_wider_model_is_refused_by_name():
    base = {"w": torch.zeros(2, 3)}
    with pytest.raises(InvalidOption, match=r"ServerAdam steps .* PFNM gave 'w' the shape \[4, 3\], .* \[2, 3\]"):
        ServerAdam().check_widths({"w": torch.zeros(4, 3)}, base, "PFNM")
