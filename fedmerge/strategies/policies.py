"""What a strategy does when clients fail, are late, or too few are left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fedmerge.errors import ClientFailed, InvalidOption
from fedmerge.strategies.failures import tell

__all__ = ["RoundFailures", "RoundPolicies"]


@dataclass(frozen=True)
class RoundPolicies:
    """Policies of a round.

    Parameters
    ----------
    on_client_error
        ``"skip"`` leaves a client that fails out of its round, ``"raise"`` ends the run with its name.
    on_too_few
        ``"raise"`` ends the run where fewer updates than wanted can be merged, ``"skip"`` keeps the model as it is and
        goes on with the next round.
    round_timeout
        Seconds to wait for replies, None for as long as Flower does.

    Raises
    ------
    InvalidOption
        A value that it does not know, or no time at all.

    Examples
    --------
    >>> RoundPolicies(on_client_error="raise").check([(3, "disk on fire")], round=2)
    Traceback (most recent call last):
    ...
    fedmerge.errors.ClientFailed: round 2: client 3 failed: disk on fire. Mend the client, or take \
on_client_error = "skip", which leaves it out of the round.
    """

    on_client_error: Literal["skip", "raise"] = "skip"
    on_too_few: Literal["raise", "skip"] = "raise"
    round_timeout: float | None = None

    def __post_init__(self) -> None:
        for name in ("on_client_error", "on_too_few"):
            if getattr(self, name) not in ("skip", "raise"):
                raise InvalidOption(f'{name} must be "skip" or "raise", got {getattr(self, name)!r}')
        timeout = self.round_timeout
        if timeout is not None and not (isinstance(timeout, int | float) and timeout > 0 and not math.isnan(timeout)):
            raise InvalidOption(f"round_timeout must be a positive number of seconds, got {timeout!r}")

    def check(self, failures: Iterable[tuple[int | str, str]], round: int) -> None:
        """Look at the clients that failed in a round, and why.

        Raises
        ------
        ClientFailed
            There is one, and the policy is ``"raise"``.
        """
        if self.on_client_error == "raise":
            for client, reason in failures:
                raise ClientFailed(client, round, reason.partition("\n")[0])


@dataclass
class RoundFailures:
    """The clients that failed in one round, in all its exchanges, under `policies`."""

    policies: RoundPolicies
    clients: list[ClientFailed] = field(default_factory=list)

    def note(self, more: Sequence[ClientFailed], about: str = "") -> None:
        """Tell of clients that failed in an exchange.

        Raises
        ------
        ClientFailed
            There is one, and the policy is ``"raise"``.
        """
        tell(more, about)
        self.clients += more
        for one in more:
            self.policies.check([(one.client, one.reason)], one.round)
