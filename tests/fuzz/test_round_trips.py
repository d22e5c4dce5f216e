"""What is written comes back: arrays on the wire, packed statistics, configurations."""

from __future__ import annotations

import tomllib

import tomli_w
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.records.atomic_files import _without_none
from fedmerge.simulation.runs.config import make_config
from fedmerge.statistics import Activations, FisherKfac, Gram
from fedmerge.statistics.sending.compression import decode, encode
from fedmerge.strategies import from_arrays, to_arrays

DRAWN = settings(max_examples=60, deadline=None, derandomize=True)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.bool, torch.uint8,
          torch.int8, torch.int16, torch.int32, torch.int64)  # fmt: skip
SHAPES = st.lists(st.integers(0, 4), max_size=5).map(tuple)


@DRAWN
@given(st.dictionaries(st.text(max_size=20), st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=4), st.booleans())
def test_any_tensors_travel_under_any_names(wanted, transposed):
    state = {}
    for name, (shape, dtype) in wanted.items():
        bits = torch.randint(0, 2, shape).to(dtype)
        state[name] = bits.transpose(0, -1) if transposed and shape else bits
    back = from_arrays(to_arrays(state))
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name], tensor)


@DRAWN
@given(
    st.integers(1, 7), st.integers(1, 3), st.booleans(), st.sampled_from(("auto", "none", "float16", "int8")),
    st.integers(0, 2000), st.integers(0, 2**20),
)  # fmt: skip
def test_packed_statistics_come_back_in_their_shapes_and_close(size, groups, grouped, level, budget, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(groups, 4 * size, size, generator=generator)
    matrix = rows.transpose(1, 2) @ rows / (4 * size)
    value = {"w.A": matrix if grouped else matrix[0], "b.diag": torch.rand(size, generator=generator),
             "x.mean": torch.randn(size, generator=generator)}  # fmt: skip
    encoded = encode(value, level, budget)
    shapes = {}
    back = decode(encoded.state, shapes.update)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in value.items()}
    assert all(tuple(shape) == tuple(value[name].shape) for name, shape in shapes.items())
    if level == "none":
        assert all(torch.equal(back[name], tensor) for name, tensor in value.items())
    elif level == "float16":
        assert encoded.error < 2e-3
    assert torch.allclose(back["w.A"].diagonal(dim1=-2, dim2=-1), value["w.A"].diagonal(dim1=-2, dim2=-1), rtol=0.1)


@DRAWN
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "methods": st.lists(st.sampled_from(("fedavg", "fednova", "median", "krum(attackers=0.1)")), min_size=1,
                                max_size=3, unique=True),
            "rounds": st.integers(1, 10**6),
            "seeds": st.lists(st.integers(0, 2**40), min_size=1, max_size=3, unique=True),
            "fraction_train": st.floats(0.001, 1),
            "batch_norm": st.sampled_from(("mean", "pooled", "recalibrate", "local")),
            "partition": st.fixed_dictionaries({"scheme": st.just("dirichlet"), "alpha": st.floats(1e-3, 1e3)},
                                               optional={"clients": st.integers(1, 10**5)}),
            "training": st.fixed_dictionaries({}, optional={"learning_rate": st.floats(1e-6, 10),
                                                            "epochs": st.integers(1, 50)}),
        },
    )
)  # fmt: skip
def test_a_configuration_written_out_and_read_is_the_same(given_settings):
    config = make_config(given_settings)
    written = tomli_w.dumps(_without_none(config.model_dump(mode="json")))
    assert make_config(tomllib.loads(written)) == config


def test_what_a_packed_statistic_would_become_is_known_before_it_is_made():
    state = {"0.weight": torch.zeros(3, 5), "0.bias": torch.zeros(3)}
    for kind in (Gram(), FisherKfac(), Activations()):
        kind.check_shapes({}, state)
    Gram().check_shapes({"0.weight": (6, 6)}, state)
    FisherKfac().check_shapes({"0.weight.A": (5, 5), "0.weight.G": (3, 3)}, state)
