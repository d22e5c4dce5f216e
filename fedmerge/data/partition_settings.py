"""How to divide a data set among clients."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fedmerge.errors import InvalidOption, UnknownName, shown
from fedmerge.registry import entries

__all__ = ["PartitionSettings", "Scheme"]

_USUAL_CLIENTS = 10
_MOST = 10**12  # of anything: floats still count it exactly

Scheme = Literal["iid", "dirichlet", "pathological", "shard", "quantity", "by_class_groups", "natural", "column"]


@dataclass(frozen=True)
class PartitionSettings:
    """How to divide a data set among clients.

    Parameters
    ----------
    scheme : str
        - `iid`: equal parts, at random.
        - `dirichlet`: for each class, the clients' shares are a Dirichlet draw (arXiv:1905.12022).
        - `pathological`: each client has `classes_per_client` classes (arXiv:2102.02079). Client k has class
          k modulo the number of classes, the others are drawn; a class that nobody has stays unused,
          which only happens with fewer clients than classes.
        - `shard`: examples sorted by class and cut into equal shards, dealt at random (arXiv:1602.05629).
          Examples left over by the division, fewer than there are shards, stay unused.
        - `quantity`: classes at random, sizes unequal. Each client gets the smallest size that
          `min_examples` allows, and one Dirichlet draw shares out the rest.
        - `by_class_groups`: the classes fall into disjoint `groups`; client k has examples of group k modulo the
          number of groups alone, and the clients of a group share its examples in equal parts, at random. Classes of
          no group stay unused.
        - `natural`: the clients that the data set itself names, the first `clients` of them.
        - `column`: a client for each value of a column of the data set, the first `clients` of them in sorted order.
        - ``module:function``: a division of one's own, see :mod:`fedmerge.data.own_division`.
    clients : int or None
        Number of clients; None takes all that `natural` and `column` have, lets a function decide, is one for each of
        the `groups` that are told, and 10 for the other schemes.
    alpha : float
        Concentration of the Dirichlet draw, above 0: the smaller, the more the clients differ.
        For `dirichlet` and `quantity`.
    classes_per_client : int
        Classes that a client has. For `pathological`.
    shards_per_client : int
        Shards that a client gets. For `shard`.
    groups : int, list of lists of int, or None
        How many groups of classes, which are cut in the order of their numbers as evenly as possible, or the classes
        of each group; None makes as many as there are clients, and at most one for each class. For `by_class_groups`.
    min_examples : int
        Fewest training examples (those held out not counted) that a client may have, at least 1.
    held_out : float
        Share of each client's examples that it does not train on, rounded to a whole number; in [0, 1).
        One example at least is left for training.
    max_examples : int or None
        Most examples that a client keeps, held-out ones included, chosen at random; None keeps all.
    column : str
        The column's name. For `column`.
    options : dict
        What a ``module:function`` is called with besides.

    Raises
    ------
    UnknownName
        For an unknown scheme.
    InvalidOption
        For a value out of its range.

    Examples
    --------
    >>> PartitionSettings("dirichlet", clients=20, alpha=0.1).held_out
    0.1
    >>> PartitionSettings(alpha=0)
    Traceback (most recent call last):
    fedmerge.errors.InvalidOption: partition setting alpha=0: must be a finite number above 0.
    """

    scheme: str = "dirichlet"
    clients: int | None = None
    alpha: float = 0.3
    classes_per_client: int = 2
    shards_per_client: int = 2
    groups: int | tuple[tuple[int, ...], ...] | None = None
    min_examples: int = 1
    held_out: float = 0.1
    max_examples: int | None = None
    column: str = ""
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.own and self.scheme not in get_args(Scheme):
            own = "A function of your own goes by module:function."
            raise UnknownName(
                "partition scheme", self.scheme, list(dict.fromkeys([*get_args(Scheme), *entries("partition")])), own
            )
        if (self.scheme == "column") != bool(self.column):
            raise InvalidOption(
                f"partition setting column={self.column!r} with scheme={self.scheme!r}: a partition by column wants "
                "both, scheme=column and the column's name; others want neither."
            )
        if self.options and not self.own:
            raise InvalidOption(
                f"partition setting options={shown(self.options)}: these are for a module:function, scheme "
                f"{self.scheme!r} has its settings beside it."
            )
        self._check_groups()
        if self.clients is None and self.scheme == "by_class_groups" and self.groups is not None:
            object.__setattr__(self, "clients", self.groups if isinstance(self.groups, int) else len(self.groups))
        if self.clients is None and self.scheme not in ("natural", "column") and not self.own:
            object.__setattr__(self, "clients", _USUAL_CLIENTS)
        for name in ("clients", "classes_per_client", "shards_per_client", "min_examples", "max_examples"):
            value = getattr(self, name)
            if value is not None or name not in ("clients", "max_examples"):
                _check_count(name, value)
        if not (_is_number(self.alpha) and 0 < self.alpha < math.inf):
            raise InvalidOption(f"partition setting alpha={self.alpha!r}: must be a finite number above 0.")
        if not (_is_number(self.held_out) and 0 <= self.held_out < 1):
            raise InvalidOption(f"partition setting held_out={self.held_out!r}: must be in [0, 1).")
        if self.max_examples is not None and self.max_examples < self.fewest_rows:
            raise InvalidOption(
                f"partition setting max_examples={self.max_examples}: "
                f"min_examples={self.min_examples} with held_out={self.held_out} takes {self.fewest_rows}. "
                "Raise max_examples or lower min_examples."
            )

    def _check_groups(self) -> None:
        """Groups as a number, or as tuples of classes, each in one group."""
        if self.groups is None:
            return
        if self.scheme != "by_class_groups":
            raise InvalidOption(
                f"partition setting groups={shown(self.groups)}: these are for scheme by_class_groups, and scheme is "
                f"{self.scheme!r}."
            )
        if isinstance(self.groups, int):
            _check_count("groups", self.groups)
            return
        groups = self.groups if isinstance(self.groups, list | tuple) else ()
        if not groups or not all(isinstance(group, list | tuple) and group for group in groups):
            raise InvalidOption(
                f"partition setting groups={shown(self.groups)}: must be a number, or lists of classes such as "
                "[[0, 1], [2, 3]]."
            )
        classes = [label for group in groups for label in group]
        if not all(isinstance(label, int) and not isinstance(label, bool) and label >= 0 for label in classes):
            raise InvalidOption(f"partition setting groups={shown(self.groups)}: classes are whole numbers from 0.")
        twice = next((label for label in classes if classes.count(label) > 1), None)
        if twice is not None:
            raise InvalidOption(
                f"partition setting groups={shown(self.groups)}: class {twice} stands there twice: groups are disjoint."
            )
        object.__setattr__(self, "groups", tuple(map(tuple, groups)))

    @property
    def own(self) -> bool:
        """Whether a function of the user's divides, or of another package."""
        if self.scheme in get_args(Scheme) or not isinstance(self.scheme, str):
            return False
        return ":" in self.scheme or self.scheme in entries("partition")

    def held_out_of(self, examples: int) -> int:
        """How many of a client's examples are held out.

        Examples
        --------
        >>> [PartitionSettings(held_out=0.5).held_out_of(n) for n in (1, 2, 10)]
        [0, 1, 5]
        """
        return max(0, min(round(self.held_out * examples), examples - 1))

    @property
    def fewest_rows(self) -> int:
        """Smallest number of examples of which `min_examples` are left for training."""
        if self.min_examples == 1:
            return 1  # one example is always left for training
        # The answer is near this bound, which rounding may miss by one or two.
        bound = math.floor((self.min_examples - 0.5) / (1 - self.held_out))
        examples = max(self.min_examples, bound - 1)
        while examples - self.held_out_of(examples) < self.min_examples:
            examples += 1
        return examples


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
        raise InvalidOption(f"partition setting {name}={shown(value)}: must be an integer from 1 to {_MOST}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
