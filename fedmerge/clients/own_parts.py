"""What a client adds to the model that it is sent, and keeps of the one that it trains."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor, nn

from fedmerge.adapters.folded_base import with_folded
from fedmerge.errors import ConfigError, InvalidOption, ModelError
from fedmerge.layout import FrozenMode, Layout, without_personal
from fedmerge.models.resize import copy_of
from fedmerge.state import State, module_state
from fedmerge.training.local_training import LocalTraining
from fedmerge.wire.fingerprints import differing, fingerprint, names_mark
from fedmerge.wire.keys import FINGERPRINT_KEY, MODE_KEY, NAMES_KEY, PERSONAL_KEY
from fedmerge.wire.record_values import from_arrays, to_arrays

__all__ = ["ABOUT_PARTS", "OwnParts", "OwnPartsOf", "unmeasured"]

ABOUT_PARTS = (PERSONAL_KEY, MODE_KEY, FINGERPRINT_KEY)
"""Entries of a message's configuration that are about tensors that do not travel."""
_KEPT = "fedmerge.personal"


@dataclass(frozen=True, eq=False)
class OwnParts:
    """What of a model does not travel, on the client's side.

    Parameters
    ----------
    layout
        Which tensors those are.
    usual
        All tensors as ``model_fn`` makes them: frozen ones always are these, personal ones to begin with.
    leaves_out
        Whether the server makes frozen tensors itself, so that none are sent.
    """

    layout: Layout
    usual: State
    leaves_out: bool

    @property
    def completes(self) -> bool:
        """Whether the client makes, or keeps, all that the server need not send."""
        return bool(self.layout.still) and (self.leaves_out or not self.layout.known)

    def received(self, state: State, kept: RecordDict | None) -> State:
        """A model as it was sent, with what does not travel.

        To a server that knows nothing of layouts, what it sends of frozen tensors counts.
        """
        layout = self.layout
        if not layout.still:
            return state
        fixed = layout.known if self.leaves_out else [name for name in layout.known if name not in state]
        mine = self.kept(kept)
        own = {name: mine.get(name, self.usual[name]) for name in layout.personal}
        return {**with_folded(state, self.usual, fixed), **own}

    def sent(self, state: State) -> dict[str, Tensor]:
        """The part of a trained model, or of many stacked, that goes to the server."""
        out = self.layout.still if self.leaves_out else set(self.layout.personal)
        return {name: tensor for name, tensor in state.items() if name not in out}

    def kept(self, kept: RecordDict | None) -> Mapping[str, Tensor]:
        """The client's personal tensors in what it keeps, where it has trained before."""
        record = None if kept is None else kept.array_records.get(_KEPT)
        found = {} if record is None else from_arrays(record)
        return {name: tensor for name, tensor in found.items() if name in self.layout.personal}

    def keep(self, state: State, kept: RecordDict) -> None:
        """Leave the personal tensors in what the client keeps."""
        if self.layout.personal:
            kept[_KEPT] = to_arrays({name: state[name] for name in self.layout.personal})

    @torch.no_grad()
    def join(self, model: nn.Module, kept: RecordDict | None = None) -> nn.Module:
        """A model of the client's own, in place, with the frozen tensors that all share.

        Raises
        ------
        ModelError
            They are of other shapes.
        """
        tensors, mine = model.state_dict(), self.kept(kept)
        for name in self.layout.still:
            value = mine.get(name, tensors[name]) if name in self.layout.personal else self.usual[name]
            if tensors[name].shape != value.shape:
                raise ModelError(
                    f"{name!r} does not travel, and own_model_fn makes it {list(tensors[name].shape)} where model_fn "
                    f"makes it {list(value.shape)}: own models may differ in what is trained and sent alone"
                )
            tensors[name].copy_(value)
        return model

    def measured(self, model: nn.Module) -> AbstractContextManager[None]:
        """Mark personal parameters as not trained for a while: nothing of them is measured and sent."""
        return unmeasured(model, self.layout.personal)

    def phases(self, settings: LocalTraining) -> list[tuple[Collection[str], LocalTraining]]:
        """How a client trains, one after the other: which parameters stay as they are, and how.

        Raises
        ------
        InvalidOption
            A personal part is to be trained first, and there is none.
        """
        if not settings.personal_epochs:
            return [((), settings)]
        if not self.layout.personal:
            raise InvalidOption(
                f"personal_epochs = {settings.personal_epochs} trains the personal part first, and nothing is "
                "personal: name its tensors in personal, or leave personal_epochs out"
            )
        first = replace(settings, epochs=settings.personal_epochs, steps=None)
        return [(self.layout.trained, first), (self.layout.personal, settings)]


@contextmanager
def unmeasured(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Mark these parameters as not trained for a while."""
    before = [(p, p.requires_grad) for name, p in model.named_parameters() if name in names]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, trained in before:
            parameter.requires_grad_(trained)


@dataclass(eq=False)
class OwnPartsOf:
    """The parts of a client app's model that do not travel, by what messages say.

    Parameters
    ----------
    template
        A model as ``model_fn`` makes it.
    personal
        Patterns of tensors that the client keeps, whatever the server says.
    """

    template: nn.Module
    personal: tuple[str, ...] = ()
    _layouts: dict[Any, Layout] = field(default_factory=dict)

    @cached_property
    def usual(self) -> State:
        """The model's tensors."""
        return module_state(self.template)[0]

    def shared(self, layout: Layout) -> nn.Module:
        """A model whose personal parameters count as not trained."""
        return without_personal(copy_of(self.template), layout) if layout.personal else self.template

    def told(self, config: ConfigRecord, personal: Sequence[str], frozen_mode: FrozenMode) -> OwnParts:
        """What goes for a message of this configuration.

        `personal` are the patterns that it names; `frozen_mode` holds where it does not say.

        Raises
        ------
        ConfigError
            The server takes other tensors for personal than the client.
        ModelError
            The server's frozen tensors are other ones than those that ``model_fn`` makes here.
        """
        patterns, mode = self._patterns(personal), config.get(MODE_KEY, frozen_mode)
        if mode not in ("eval", "train"):
            raise ConfigError(f"the message's {MODE_KEY!r} must be eval or train, got {mode!r}")
        key = patterns, mode
        if key not in self._layouts:
            self._layouts[key] = Layout.of_module(self.template, patterns, frozen_mode=mode)  # type: ignore[arg-type]
        layout = self._layouts[key]
        return OwnParts(layout, self.usual, self._agrees(config, layout))

    def _patterns(self, told: Sequence[str]) -> tuple[str, ...]:
        if told and self.personal and set(told) != set(self.personal):
            raise ConfigError(
                f"the server takes {list(told)} for personal, this client {list(self.personal)}: give both the same"
            )
        return self.personal or tuple(told)

    def _agrees(self, config: ConfigRecord, layout: Layout) -> bool:
        """Whether the server makes the frozen tensors itself, which are then to be these."""
        mark = config.get(FINGERPRINT_KEY)
        if not isinstance(mark, list):
            return False
        names = sorted(layout.known)
        if config.get(NAMES_KEY) != names_mark(names):
            raise ModelError(
                f"{len(mark) // 2} tensors of the server's model are frozen, and {len(names)} of this client's, or "
                "others: have model_fn freeze the same ones (requires_grad=False) on both sides, with one frozen_mode"
            )
        other = differing(names, [float(number) for number in mark], self._mark(tuple(names)))
        if other is not None:
            raise ModelError(
                f"frozen tensor {other!r} of this client's model_fn is not the server's: frozen tensors are not sent, "
                "so load them from the same file, or draw them from the same seed, on both sides; or have the server "
                'send them (send_frozen="always")'
            )
        return True

    def _mark(self, names: tuple[str, ...]) -> list[float]:
        if names not in self._marks:
            self._marks[names] = fingerprint(self.usual, names)
        return self._marks[names]

    @cached_property
    def _marks(self) -> dict[tuple[str, ...], list[float]]:
        return {}
