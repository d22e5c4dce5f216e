"""Which kinds of parts can be registered, where fedmerge's own stand, and how other packages announce theirs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

__all__ = ["KINDS", "METHOD_KINDS", "Kind", "kind_of"]


METHOD_KINDS = ("edit", "aggregator", "server step", "refinement", "trajectory")
"""Kinds of which a method is written, in the order in which they stand."""


@dataclass(frozen=True)
class Kind:
    """One kind of parts.

    Parameters
    ----------
    name
        In the singular, as errors call it.
    plural
        As the command line and entry points call it.
    homes
        Packages whose modules register fedmerge's own parts, or single modules.
    frozen
        Whether a part has to be a frozen dataclass.
    given
        Parameters that fedmerge fills in itself, and which are no options therefore.
    shares
        Other kinds whose names must differ, for they are written in the same places.
    own
        Whether ``module:name`` brings one of the user's own. Statistics are asked for by messages, which must not
        make anybody import anything.

    Examples
    --------
    >>> KINDS["data set"].group
    'fedmerge.datasets'
    """

    name: str
    plural: str
    homes: tuple[str, ...]
    frozen: bool = True
    given: frozenset[str] = frozenset()
    shares: tuple[str, ...] = ()
    own: bool = True

    @property
    def group(self) -> str:
        """The group of entry points under which other packages announce theirs."""
        return f"fedmerge.{self.plural}"

    @property
    def title(self) -> str:
        """As the heading of a list.

        Examples
        --------
        >>> KINDS["server step"].title, KINDS["trajectory"].title
        ('Server steps', 'Trajectories')
        """
        ending = "ies" if self.name.endswith("y") else self.name[-1] + "s"
        return f"{self.name[:-1]}{ending}".capitalize()

    @cached_property
    def named_with(self) -> tuple[str, ...]:
        """Kinds among which a name is used once, its own first."""
        return (self.name, *self.shares)


def _in_a_method(kind: str) -> tuple[str, ...]:
    """The other kinds that a method is written of, joined by ``+``."""
    return tuple(other for other in METHOD_KINDS if other != kind)


_DIVIDED = frozenset({"asked", "dataset", "clients", "generator"})
_FROM_DATA = frozenset({"input_shape", "num_classes"})

KINDS = {
    kind.name: kind
    for kind in (
        Kind("edit", "edits", ("fedmerge.edits",), shares=_in_a_method("edit")),
        Kind("aggregator", "aggregators", ("fedmerge.aggregators",), shares=_in_a_method("aggregator")),
        Kind("server step", "server_steps", ("fedmerge.server_steps",), shares=_in_a_method("server step")),
        Kind("refinement", "refinements", ("fedmerge.refine",), shares=_in_a_method("refinement")),
        Kind("trajectory", "trajectories", ("fedmerge.trajectories",), shares=_in_a_method("trajectory")),
        Kind("statistic", "statistics", ("fedmerge.statistics",), own=False),
        Kind("task", "tasks", ("fedmerge.tasks",)),
        Kind("metric", "metrics", ("fedmerge.tasks",)),
        Kind("data set", "datasets", ("fedmerge.data",), frozen=False, given=frozenset({"data_dir", "folder"})),
        Kind("model", "models", ("fedmerge.models",), frozen=False, given=_FROM_DATA),
        Kind("partition", "partitions", ("fedmerge.data",), frozen=False, given=_DIVIDED),
        Kind("domain", "domains", ("fedmerge.data",)),
        Kind("attack", "attacks", ("fedmerge.simulation.scenarios.attacks",)),
        Kind("local rule", "local_rules", ("fedmerge.training.rules",), own=False),
        Kind("schedule", "schedules", ("fedmerge.training.schedules",)),
        Kind("observer", "observers", ("fedmerge.observers",), frozen=False),
    )
}
"""Every kind by its name."""


def kind_of(word: str) -> Kind | None:
    """The kind that a word of the command line means, in singular or plural, with blanks, ``-`` or ``_``.

    Examples
    --------
    >>> kind_of("server-steps").name, kind_of("Data sets").name, kind_of("horses")
    ('server step', 'data set', None)
    """
    plain = _plain(word)
    for kind in KINDS.values():
        if plain in {_plain(kind.name), _plain(kind.name) + "s", _plain(kind.plural)}:
            return kind
    return None


def _plain(word: str) -> str:
    return word.casefold().replace(" ", "").replace("-", "").replace("_", "")
