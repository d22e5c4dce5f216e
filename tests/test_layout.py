"""Which of a model's tensors are trained, frozen, personal or buffers, and which of them travel."""

import copy

import pytest
import torch
from torch import nn

from fedmerge.errors import BadUpdate, InvalidOption, NoUsableUpdates, UnknownName
from fedmerge.layout import Layout, check_patterns, freeze, frozen_parts
from fedmerge.merging import build_pipeline
from fedmerge.statistics import BatchNormMoments
from fedmerge.statistics.measuring.measurable import Measurable
from fedmerge.strategies.travel import facts_of
from fedmerge.training import LocalTraining, Participant, train_cohort, train_one_by_one
from fedmerge.update import ClientUpdate, MergeContext, StackedUpdates
from fedmerge.wire.fingerprints import differing, fingerprint, names_mark

MATCHING = [
    "rebasin", "otfusion", "pfnm(class_aware=false)", "fedma(class_aware=false)", "gamf", "c2m3", "zipit", "cca",
]  # fmt: skip


class LowRank(nn.Module):
    """A linear layer that stays as it is, with a pair of small ones that is trained."""

    def __init__(self, width, out, rank):
        super().__init__()
        self.base = nn.Linear(width, out).requires_grad_(False)
        self.A, self.B = nn.Parameter(0.1 * torch.randn(rank, width)), nn.Parameter(torch.zeros(out, rank))

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


def convolutional(frozen=("body",)):
    torch.manual_seed(0)
    model = nn.Sequential()
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
    model.add_module("body", body)
    model.add_module("mid", nn.Sequential(nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU()))
    model.add_module("head", nn.Linear(8, 3))
    return freeze(model, frozen)


def test_every_tensor_is_sorted_once():
    model = convolutional()
    layout = Layout.of_module(model, ["head.*"])
    kinds = (
        layout.trained, layout.float_buffers, layout.integer_buffers, layout.frozen, layout.frozen_buffers,
        layout.personal,
    )  # fmt: skip
    assert sorted(name for kind in kinds for name in kind) == sorted(model.state_dict())
    assert layout.trained == ("mid.0.weight", "mid.0.bias", "mid.1.weight", "mid.1.bias")
    assert layout.float_buffers == ("mid.1.running_mean", "mid.1.running_var")
    assert layout.integer_buffers == ("mid.1.num_batches_tracked",)
    assert layout.frozen_buffers == ("body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked")
    assert layout.personal == ("head.weight", "head.bias")


def test_buffers_go_where_the_parameters_of_their_part_go():
    """Also those of norms without parameters, which belong to what is around them."""
    body = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False)).requires_grad_(False)
    model = nn.Sequential(body, nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
    layout = Layout.of_module(model)
    assert set(layout.frozen_buffers) == {"0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked"}
    assert layout.float_buffers == ("1.running_mean", "1.running_var")
    assert Layout.of_module(model, frozen_mode="train").frozen_buffers == ()
    norms = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert set(Layout.of_module(norms, ["1.weight", "1.bias"]).personal) == {
        n for n in norms.state_dict() if n[0] == "1"
    }


def test_a_layers_name_stands_for_what_is_in_it_and_one_name_of_a_shared_tensor_for_all():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    model[2].weight = model[0].weight
    assert Layout.of_module(model, ["2"]).personal == ("0.weight", "2.weight")
    assert Layout.of_module(model).trained == ("0.weight", "1.weight", "1.bias")


def test_a_pattern_that_matches_nothing_names_the_tensors():
    with pytest.raises(UnknownName, match=r"'heads\.\*'.*Did you mean.*head.*mid\.0\.weight"):
        Layout.of_module(convolutional(), ["heads.*"])
    with pytest.raises(UnknownName, match="tensor in frozen"):
        convolutional(["boddy"])


@pytest.mark.parametrize("given", ["head.*", [1], [""], 3])
def test_patterns_are_a_list_of_texts(given):
    with pytest.raises(InvalidOption, match="list of patterns"):
        check_patterns(given)


def test_something_has_to_be_left_to_train_and_to_merge():
    with pytest.raises(InvalidOption, match="leaves nothing"):
        Layout.of_module(convolutional(), ["mid", "head"])
    with pytest.raises(InvalidOption, match="leaves nothing to train"):
        convolutional(["*"])


def test_a_model_made_ready_for_use_says_nothing_of_how_it_was_trained():
    model = convolutional(()).requires_grad_(False)
    assert not Layout.of_module(model).still
    assert frozen_parts(model) == []


def test_what_travels_and_what_completes_it():
    model = convolutional()
    layout, state = Layout.of_module(model, ["head"]), model.state_dict()
    sent = layout.travelling(state)
    assert sum(t.numel() for t in sent.values()) == 36 * 8 + 8 + 4 * 8 + 1
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    whole = layout.completed({**sent, "head.bias": other["head.bias"]}, state)  # what it brings of it does not count
    assert all(torch.equal(whole[name], state[name]) for name in state)
    assert set(whole) == set(state)


def test_low_rank_pairs_alone_travel():
    model = nn.Sequential(LowRank(64, 128, 4), nn.ReLU(), LowRank(128, 10, 4))
    layout = Layout.of_module(model)
    assert layout.trained == ("0.A", "0.B", "2.A", "2.B")
    assert set(layout.frozen) == {"0.base.weight", "0.base.bias", "2.base.weight", "2.base.bias"}


@pytest.mark.parametrize("engine", [train_cohort, train_one_by_one])
@pytest.mark.parametrize("frozen_mode", ["eval", "train"])
def test_frozen_parts_run_as_in_use_while_the_rest_trains(engine, frozen_mode):
    """Dropout is off in them, and their statistics stay; both engines train to the same model."""
    model, before = convolutional(), copy.deepcopy(convolutional().state_dict())
    people = [Participant(i, torch.randn(12 + i, 1, 5, 5), torch.arange(12 + i) % 3) for i in range(3)]
    settings = LocalTraining(epochs=2, batch_size=5, frozen_mode=frozen_mode)
    done = engine(model, people, settings, seed=0, round=1).states
    moved = not torch.equal(done["body.1.running_mean"][0], before["body.1.running_mean"])
    assert moved == (frozen_mode == "train")
    assert not torch.equal(done["mid.1.running_mean"][0], before["mid.1.running_mean"])
    assert all(torch.equal(done[name][1], before[name]) for name in before if name.startswith("body.0"))
    other = train_one_by_one(model, people, settings, seed=0, round=1).states
    for name, stacked in done.items():
        torch.testing.assert_close(stacked, other[name], rtol=1e-5, atol=1e-5)


def test_without_dropout_in_use_a_frozen_body_gives_what_it_gives_in_use():
    """A head trained on the body's features alone is the head that the whole model gets."""
    model = convolutional(["body", "mid"])
    x, y = torch.randn(20, 1, 5, 5), torch.arange(20) % 3
    settings = LocalTraining(epochs=2, batch_size=6)
    whole = train_one_by_one(model, [Participant(0, x, y)], settings, seed=0, round=1).states
    with torch.no_grad():
        features = copy.deepcopy(model[:2]).eval()(x)
    head = train_one_by_one(copy.deepcopy(model.head), [Participant(0, features, y)], settings, seed=0, round=1).states
    torch.testing.assert_close(whole["head.weight"], head["weight"])


def test_norms_of_frozen_parts_are_not_measured_afresh():
    model, batches = convolutional(), [(torch.randn(16, 1, 5, 5), torch.zeros(16).long())]
    assert set(BatchNormMoments().measure(model, batches, None)) == {"mid.1.running_mean", "mid.1.running_var"}
    assert Measurable.of(model).norms == {"mid.1.running_mean", "mid.1.running_var"}
    with torch.no_grad():
        seen = copy.deepcopy(model).eval()[:1](batches[0][0])
        mean = model.mid[0](seen).mean(0)
    torch.testing.assert_close(BatchNormMoments().measure(model, batches, None)["mid.1.running_mean"], mean)


def told(model, personal=()):
    layout = Layout.of_module(model, personal)
    return layout, MergeContext(base=model.state_dict(), **facts_of(model, layout)[1])


def updates_of(model, layout, count=3, *, whole=False):
    """What clients send: trained tensors moved, the others left out or as they were."""
    found = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        state = {
            n: t + 0.1 * torch.randn(t.shape, generator=generator).abs()
            if n not in layout.still and t.is_floating_point()
            else t
            for n, t in model.state_dict().items()
        }
        found.append(ClientUpdate(i, state if whole else layout.travelling(state), 1.0 + i))
    return found


@pytest.mark.parametrize("method", ["fedavg", "median", "krum", "fedatt", "fedavg+server_momentum"])
def test_an_update_without_what_is_frozen_merges_as_one_with_it(method):
    model = convolutional()
    layout, context = told(model, ["head.*"])
    pipeline = build_pipeline(method)
    brief = pipeline.merge(updates_of(model, layout), context).state
    whole = pipeline.merge(updates_of(model, layout, whole=True), context).state
    assert set(brief) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(brief[name], whole[name]), name
        assert torch.equal(brief[name], tensor) == (name in layout.still or name.endswith("num_batches_tracked")), name


def test_a_fold_takes_updates_with_and_without_what_is_frozen():
    model = convolutional()
    layout, context = told(model)
    pipeline = build_pipeline("fedavg")
    merged = []
    for whole in (False, True):
        states = [update.state for update in updates_of(model, layout, whole=whole)]
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        block = StackedUpdates((0, 1, 2), stacked, (1.0, 2.0, 3.0), ({}, {}, {}))
        merged.append(pipeline.finish(pipeline.fold([block], context, None), context, None, None).state)
    one_by_one = pipeline.merge(updates_of(model, layout), context).state
    assert all(torch.equal(merged[0][n], merged[1][n]) and torch.equal(merged[0][n], one_by_one[n]) for n in one_by_one)


def test_who_trains_what_is_frozen_is_told_and_left_out():
    model = convolutional()
    layout, context = told(model)
    good = updates_of(model, layout, whole=True)
    moved = {**good[1].state, "body.0.weight": good[1].state["body.0.weight"] + 0.1}
    # A stock client's own norms and a shorter type say nothing of its training.
    norms = {**good[2].state, "body.1.running_mean": torch.ones(4), "body.0.bias": good[2].state["body.0.bias"].half()}
    mixed = [good[0], ClientUpdate(1, moved, 1.0), ClientUpdate(2, norms, 3.0)]
    result = build_pipeline("fedavg").merge(mixed, context)
    assert result.accepted == (0, 2)
    assert "frozen parameter 'body.0.weight' is not as it was sent" in result.dropped[0].reason
    assert torch.equal(result.state["body.1.running_mean"], model.body[1].running_mean)
    with pytest.raises(NoUsableUpdates, match="requires_grad=False"):
        build_pipeline("fedavg").merge([ClientUpdate(1, moved, 1.0)], context)
    with pytest.raises(BadUpdate, match="is not as it was sent"):
        build_pipeline("fedavg", on_bad_update="raise").merge([ClientUpdate(1, moved, 1.0)], context)


@pytest.mark.parametrize("personal", [(), ("4.*",)])
@pytest.mark.parametrize("method", MATCHING)
def test_neurons_that_stand_in_what_does_not_travel_stay_in_place(method, personal):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)
    )
    model[0].requires_grad_(False)
    layout, _ = told(model, personal)
    data = [torch.randn(30, 6)]
    context = MergeContext(
        base=model.state_dict(), model_fn=lambda: copy.deepcopy(model), data=data, **facts_of(model, layout)[1]
    )
    clients = updates_of(model, layout)
    # One client's neurons stand in another order: those of a free group are brought back, others must not be.
    order = torch.tensor([4, 2, 0, 1, 3])
    if not personal:
        clients[1] = ClientUpdate(1, {**clients[0].state}, 2.0)
        swapped = clients[1].state
        for name, axis in (("4.weight", 0), ("4.bias", 0), ("6.weight", 1)):
            swapped[name] = swapped[name].index_select(axis, order)
        clients = [clients[0], ClientUpdate(1, swapped, 1.0)]
    merged = build_pipeline(method).merge(clients, context).state
    for name in layout.still:
        assert torch.equal(merged[name], model.state_dict()[name]), name
    if personal:
        assert merged["2.weight"].shape == (7, 8)
        assert merged["6.weight"].shape == (3, 5)


def test_methods_that_judge_models_on_the_server_refuse_personal_parts():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    layout, _ = told(model, ["1"])
    data = [(torch.randn(6, 4), torch.zeros(6).long())]
    context = MergeContext(data=data, model_fn=lambda: model, **facts_of(model, layout)[1])
    with pytest.raises(InvalidOption, match=r"'1\.weight' is personal"):
        context.score(model.state_dict(), "fedfisher")


def test_fingerprints_tell_models_apart_and_not_processors():
    torch.manual_seed(0)
    state = {
        "w": torch.randn(40, 50),
        "n": torch.tensor(7),
        "mask": torch.full((3,), -torch.inf),
        "empty": torch.zeros(0),
    }
    names = sorted(state)
    mark = fingerprint(state, names)
    assert len(mark) == 2 * len(names)
    rounded = {**state, "w": state["w"] * (1 + 1e-6 * torch.randn(40, 50))}
    assert differing(names, mark, fingerprint(rounded, names)) is None
    assert differing(names, mark, fingerprint({**state, "w": state["w"].bfloat16()}, names)) is None
    assert differing(names, mark, fingerprint({**state, "w": torch.randn(40, 50)}, names)) == "w"
    assert differing(names, mark, fingerprint({**state, "w": state["w"].flip(0)}, names)) == "w"
    assert differing(names, mark, fingerprint({**state, "n": torch.tensor(8)}, names)) == "n"
    assert differing(names, mark, mark[:-1]) is not None
    assert differing(names, [float("nan")] * len(mark), mark) is not None
    assert names_mark(["a", "b"]) != names_mark(["a", "c"])
