"""What the laws that every registered method keeps are written with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from torch import nn

from fedmerge import ClientUpdate, MergeContext
from fedmerge.questions import respond
from tests.contract.table import ROWS
from tests.federation import CLIENTS, noisy_states, tiny_model

WEIGHTS = (5.0, 1.0, 14.0)
DRAWN = settings(max_examples=12, deadline=None, derandomize=True)
LAWS = set()


def drawn(row):
    """Draws for a law of this row: fewer where a merge traces the model, which takes tenths of a second."""
    return settings(DRAWN, max_examples=3) if row.traces else DRAWN


def law(name):
    """A law that every row keeps, but for those excused from it by this name."""
    LAWS.add(name)

    def marks(row):
        return [pytest.mark.skip(reason=row.excused[name])] if name in row.excused else []

    return pytest.mark.parametrize("row", [pytest.param(row, id=str(row), marks=marks(row)) for row in ROWS])


def base(dtype=torch.float32):
    """The initial model, with a 0-d parameter and buffers of other kinds besides its own."""
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tiny_model().state_dict().items()}
    return state | {"temperature": torch.tensor(1.5, dtype=dtype), "seen": torch.tensor([False, True])}


def updates(row, dtype=torch.float32, weights=WEIGHTS):
    result = []
    for client, state in enumerate(noisy_states(len(weights))):
        cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
        cast |= {"temperature": torch.tensor(1.5 + client, dtype=dtype), "seen": torch.tensor([client == 0, False])}
        cast |= {name: base(dtype)[name] for name in row.held}
        result.append(ClientUpdate(client, cast, weights[client], row.statistics(client, cast)))
    return result


class Known(nn.Sequential):
    """The module that `base` is the state of."""

    def __init__(self):
        super().__init__(*tiny_model())
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("seen", torch.tensor([False, True]))


def merged(row, given_updates, *, start=None, memory=None, **options):
    asked = {}
    if row.asks:
        sent = list(given_updates)
        asked["ask"] = answering(sent)
        given_updates = iter(sent) if isinstance(given_updates, Iterator) else sent
    context = MergeContext(base=start or base(), seed=1, **row.known(Known), **asked)
    return row.pipeline(**options).merge(given_updates, context, memory)


def answering(given_updates):
    """Clients with the models that they have sent, and with examples of their own."""
    own, loaders, known = {}, {}, base()
    for update in given_updates:
        draw = torch.Generator().manual_seed(update.client)
        loaders[update.client] = [(torch.randn(30, 4, generator=draw), torch.arange(30) % 3)]
        own[update.client] = Known()
        own[update.client].load_state_dict(
            {n: t for n, t in update.state.items() if n in known and t.shape == known[n].shape}, False
        )

    def ask(questions, clients):
        return [(i, [respond(q, Known(), loaders[i], own=own[i]) for q in questions]) for i in clients]

    return ask


def same(one, two):
    """Whether two states have the same names, dtypes and bits."""
    return one.keys() == two.keys() and all(t.dtype == two[n].dtype and torch.equal(t, two[n]) for n, t in one.items())


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def spoilt(update, how):
    state = dict(update.state)
    if how == "nan":
        state["0.weight"] = state["0.weight"].clone()
        state["0.weight"][0, 0] = float("nan")
    elif how == "inf":
        state["3.bias"] = state["3.bias"] * float("inf")
    elif how == "missing":
        del state["0.weight"]
    elif how == "unknown":
        state["extra.weight"] = torch.zeros(1)
    elif how == "shape":
        state["0.weight"] = state["0.weight"].T
    elif how == "kind":
        state["0.weight"] = state["0.weight"].long()
    return ClientUpdate(update.client, state, BAD_WEIGHTS.get(how, update.weight), update.statistics)


BAD_WEIGHTS = {"no examples": 0.0, "negative": -1.0, "nan weight": float("nan"), "infinite weight": float("inf")}


FAULTS = {
    "nan": "0.weight",
    "inf": "3.bias",
    "missing": "0.weight",
    "unknown": "extra.weight",
    "shape": "0.weight",
    "kind": "0.weight",
    **dict.fromkeys(BAD_WEIGHTS, "number of examples"),
}


def module(state):
    made = tiny_model()
    made.load_state_dict(state)
    return made


def modules(row):
    """Models at hand, and the keywords that the row's method takes besides."""
    keywords = {
        "base": tiny_model(),
        "statistics": [row.statistics(i, tiny_model().state_dict()) for i in range(CLIENTS)],
        **row.options,
        **row.known(None),
        **row.settings,
    }
    return [module(state) for state in noisy_states()], {"weights": list(WEIGHTS), **keywords}
