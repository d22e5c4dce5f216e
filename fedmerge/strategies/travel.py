"""What of a model a strategy's messages bring, and what they say about the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from flwr.app import ArrayRecord, ConfigRecord, Message
from torch import nn

from fedmerge.errors import InvalidOption, ModelError
from fedmerge.layout import FrozenMode, Layout, check_patterns, without_personal
from fedmerge.models.tangent import is_linearised
from fedmerge.state import State, frozen_names, module_state, tied_names
from fedmerge.statistics.measuring.measurable import Measurable
from fedmerge.strategies.heard import sender_of
from fedmerge.wire.fingerprints import fingerprint, names_mark
from fedmerge.wire.flower_records import CLIENT_KEY
from fedmerge.wire.keys import COMPLETES_KEY, FINGERPRINT_KEY, MODE_KEY, NAMES_KEY, PERSONAL_KEY
from fedmerge.wire.record_values import to_arrays

__all__ = ["SendFrozen", "Travel"]

SendFrozen = Literal["auto", "never", "always"]
"""Whether frozen tensors travel. ``auto``: a node gets them until it has said in a reply that it makes them itself.
``never``: all nodes are known to. ``always``: they travel like the rest, and no node has to."""


@dataclass
class Travel:
    """The layout of a strategy's model, and which nodes know how to complete it.

    Parameters
    ----------
    model_fn
        Makes the model; None where the strategy does not know it, and all travels.
    personal
        Patterns of tensors that stay with the clients.
    frozen_mode
        How frozen parts run in training, see :class:`~fedmerge.training.LocalTraining`.
    send_frozen
        Whether frozen tensors travel.

    Raises
    ------
    InvalidOption, UnknownName
        A setting that does not exist, or a pattern that is the name of no tensor.

    Examples
    --------
    >>> travel = Travel(lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), personal=("1.*",))
    >>> travel.layout.trained
    ('0.weight', '0.bias')
    """

    model_fn: Callable[[], nn.Module] | None = None
    personal: tuple[str, ...] = ()
    frozen_mode: FrozenMode = "eval"
    send_frozen: SendFrozen = "auto"
    layout: Layout | None = field(default=None, init=False)
    facts: dict[str, Any] = field(default_factory=dict, init=False)
    """What a :class:`~fedmerge.update.MergeContext` is told of the model."""
    buffers: frozenset[str] | None = field(default=None, init=False)
    still: frozenset[str] = field(default=frozenset(), init=False)
    """Names of all tensors that do not travel; none where the whole model does."""
    linearised: bool = field(default=False, init=False)
    """Whether the model is linearised."""
    moved: State = field(default_factory=dict, init=False)
    """What a method has added to frozen parameters, as factors that go out in their place."""
    knowing: set[int] = field(default_factory=set, init=False)
    _mark: list[float] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.personal = check_patterns(self.personal)
        for name, known in (("frozen_mode", FrozenMode), ("send_frozen", SendFrozen)):
            if getattr(self, name) not in get_args(known):
                raise InvalidOption(f"{name} must be one of {', '.join(get_args(known))}, got {getattr(self, name)!r}")
        if self.model_fn is None:
            return
        model, whole = self.model_fn(), self.send_frozen == "always"
        self.linearised = is_linearised(model)
        self.layout = Layout.of_module(model, self.personal, frozen_mode=self.frozen_mode, send_frozen=whole)
        self.buffers, self.facts = facts_of(model, self.layout)
        self.still = self.layout.still

    def merged_model(self) -> nn.Module:
        """A model of ``model_fn`` for the server, who neither trains nor measures what is personal."""
        assert self.model_fn is not None
        return without_personal(self.model_fn(), self.layout)

    @property
    def norms(self) -> frozenset[str] | None:
        """Statistics of norms that clients measure; None where no module tells."""
        return None if self.model_fn is None else Measurable.of(self.merged_model()).norms

    def within(self, wrapper: str) -> Travel:
        """The same inside a wrapper of Flower's, which holds replies against all of the model.

        Raises
        ------
        InvalidOption
            Something is personal.
        """
        if self.personal:
            raise InvalidOption(f"{wrapper} clips and changes every tensor, so none can be personal: leave it out")
        if self.send_frozen == "always":
            return self
        changed = replace(self, send_frozen="always")
        changed.facts |= {name: self.facts[name] for name in ("task",) if name in self.facts}
        return changed

    def check(self, arrays: State | ArrayRecord) -> None:
        """Make sure that the settings can be honoured for this model.

        Raises
        ------
        InvalidOption
            Nobody tells the model's tensors.
        ModelError
            The model that was started with lacks tensors.
        """
        if self.personal and self.model_fn is None:
            raise InvalidOption("personal names tensors of the model: pass model_fn=, which makes it")
        missing = sorted(name for name in self.still if name not in arrays)
        if missing:
            raise ModelError(
                f"the model that the run starts with lacks {missing[:3]}, which model_fn makes: pass all its tensors, "
                "as in initial_arrays=to_arrays(model.state_dict())"
            )

    def told(self, base: State) -> dict[str, Any]:
        """What messages say about tensors that they do not bring; nothing where they bring all."""
        told: dict[str, Any] = {}
        if self.layout is None or not self.still:
            return told
        if self.personal:
            told[PERSONAL_KEY] = list(self.personal)
        names = sorted(self.layout.known)
        if names:
            if self._mark is None:  # they do not change
                started = module_state(self.model_fn())[0] if self.moved and self.model_fn else base
                self._mark = fingerprint(started, names)
            told |= {FINGERPRINT_KEY: self._mark, NAMES_KEY: names_mark(names)}
        return {**told, MODE_KEY: self.frozen_mode}

    def down(self, arrays: ArrayRecord) -> ArrayRecord:
        """The part of a model that travels."""
        if not self.still:
            return arrays
        sent = {name: array for name, array in arrays.items() if name not in self.still}
        return ArrayRecord({**sent, **to_arrays(self.moved)} if self.moved else sent)

    def completes(self, *nodes: int) -> bool:
        """Whether these nodes make themselves what does not travel; to others a message brings all of the model."""
        return self.send_frozen != "auto" or not self.still or self.knowing.issuperset(nodes)

    def note(self, nodes: Collection[int], replies: Sequence[Message], key: str) -> None:
        """Remember the nodes that make or keep themselves what does not travel.

        Clients of ours, who reply without messages, all do. Others say so in their replies. What of it comes back from
        them all the same, for a mod wants to see it, counts for nothing: the mod may have added noise to it.
        """
        if not replies:
            self.knowing.update(nodes)
        for reply in replies if self.still and self.send_frozen != "always" else ():
            node = sender_of(reply)
            if not reply.has_content() or node is None:
                continue
            content = reply.content
            if content.config_records.get(CLIENT_KEY, ConfigRecord()).get(COMPLETES_KEY) is True:
                self.knowing.add(node)
                if key in content.array_records:
                    content[key] = self.down(content.array_records[key])

    def begin(self) -> None:
        """Forget what was of another run."""
        self.knowing, self._mark = set(), None

    def settings(self) -> dict[str, Any]:
        """What must not change between the rounds of one run, where it is not as usual."""
        changed = {"personal": list(self.personal), "frozen_mode": self.frozen_mode}
        return {name: value for name, value in changed.items() if value not in ([], "eval")}


def facts_of(model: nn.Module, layout: Layout | None = None) -> tuple[frozenset[str], dict[str, Any]]:
    """What a model tells of its tensors: which are buffers, and for a :class:`MergeContext` which are frozen and tied.

    With a `layout` of which something does not travel, that is told too.

    Examples
    --------
    >>> facts_of(nn.Linear(1, 1).requires_grad_(False))
    (frozenset(), {'frozen': frozenset(), 'tied': {}})
    """
    facts: dict[str, Any] = {"frozen": frozen_names(model), "tied": tied_names(model)}
    if layout is not None and layout.still:
        facts |= {"frozen": facts["frozen"] | layout.still, "layout": layout}
    return module_state(model)[1], facts
