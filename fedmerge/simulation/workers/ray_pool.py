"""A pool of Ray actors that survives the loss of any of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError

from fedmerge.errors import FedMergeError
from fedmerge.simulation.workers.causes import in_words

__all__ = ["Call", "CutOff", "Pool"]

Call = Callable[[Any], Any]
"""Starts one piece of work on an actor and gives the reference of its result."""

_ATTEMPTS = 3
_LOOK = 2.0  # seconds between looks at what hangs
_PATIENCE = 300.0  # seconds; restarting a lost actor takes as long as importing torch
_FETCH = 60.0  # seconds for a finished result, which may lie on a node that is gone
_SLOW, _SLOW_SECONDS = 4.0, 10.0  # times the median, and at least this long: work that somebody else does as well


class CutOff(RayError):
    """Work that took longer than it may: its actor was killed."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"cut off: it had computed for {seconds:g} s, as long as it may")
        self.seconds = seconds

    def __reduce__(self) -> tuple[type, tuple[float]]:
        return type(self), (self.seconds,)


class _Running(NamedTuple):
    number: int | None
    """Of the call; None for a ping."""
    actor: Any
    since: float


class Pool:
    """Actors that may be lost, or hang, at any moment: their work is done again by others.

    Work must be a pure function of its arguments. An actor needs a method ``ping`` that answers once it can work.

    Parameters
    ----------
    actors
        Handles of actors that Ray restarts, so that they stay valid.
    """

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)
        self._lost: deque[tuple[float, Any]] = deque()
        """Actors that are on their way back, and when to ask them."""
        self._broken: list[tuple[Any, RayActorError]] = []
        """Actors that could not even start, which Ray does not try again, and why."""

    def __len__(self) -> int:
        return len(self._actors)

    def run(self, calls: Sequence[Call], limits: Sequence[float | None] | None = None) -> Iterator[Any]:
        """Results in the order of `calls`, or the error of one that failed; no more of them at once than actors.

        Parameters
        ----------
        calls
            The work.
        limits
            Seconds that each may take; who takes longer is killed, comes back as another, and the result is a
            :class:`CutOff`. None has no limit.

        Raises
        ------
        FedMergeError
            All actors are lost, and none comes back, or none can start.
        """
        lost = self._lost
        away = [actor for _, actor in lost] + [actor for actor, _ in self._broken]
        waiting, idle = deque(range(len(calls))), [actor for actor in self._actors if actor not in away]
        running: dict[Any, _Running] = {}
        attempts, finished = [0] * len(calls), {}
        taken: list[float] = []
        position, progress = 0, time.monotonic()
        while position < len(calls):
            if idle and not waiting:
                waiting += _hanging(running, taken)
            while idle and waiting:
                number, actor = waiting.popleft(), idle.pop()
                attempts[number] += 1
                running[calls[number](actor)] = _Running(number, actor, time.monotonic())
            ready = _ready(running)
            self._ask_lost(running)
            for reference in ready:
                done, actor, since = running.pop(reference)
                result, gone = _result(reference)
                if isinstance(result, RayActorError) and result.actor_init_failed:
                    self._broken.append((actor, result))
                    self._check_started()
                elif gone:  # and asked again in a while: one that restarts says so at once
                    lost.append((time.monotonic() + _LOOK, actor))
                else:
                    idle.append(actor)
                    progress = time.monotonic()
                if done is None or done < position or done in finished:
                    continue  # a ping, or work that another has done by now
                if gone and attempts[done] < _ATTEMPTS:
                    waiting.appendleft(done)
                    continue
                taken.append(time.monotonic() - since)
                finished[done] = result
            for number, error, actor in _cut_off(running, limits):
                lost.append((time.monotonic() + _LOOK, actor))
                finished.setdefault(number, error)
            if time.monotonic() - progress > _PATIENCE and all(one.number is None for one in running.values()):
                raise FedMergeError(f"all {len(self._actors)} workers on Ray are lost and none came back: see its logs")
            while position in finished:
                yield finished.pop(position)
                position += 1
        self._leave(running, kill=limits is not None)

    def _check_started(self) -> None:
        if len(self._broken) == len(self._actors):
            reason = in_words(self._broken[0][1])
            raise FedMergeError(f"no worker on Ray can start, the first one for this reason: {reason}")

    def _ask_lost(self, running: dict[Any, _Running]) -> None:
        """Ask those that were lost a while ago whether they are back."""
        while self._lost and self._lost[0][0] < time.monotonic():
            _, actor = self._lost.popleft()
            running[actor.ping.remote()] = _Running(None, actor, time.monotonic())

    def _leave(self, running: dict[Any, _Running], *, kill: bool) -> None:
        """Note who is on the way back, or at work that others have done by now: where it is timed, it may hang."""
        for one in running.values():
            if kill and one.number is not None:
                ray.kill(one.actor, no_restart=False)
            if kill or one.number is None:
                self._lost.append((time.monotonic(), one.actor))


def _ready(running: dict[Any, _Running]) -> list[Any]:
    if running:
        return ray.wait(list(running), num_returns=1, timeout=_LOOK)[0]
    time.sleep(_LOOK)
    return []


def _cut_off(running: dict[Any, _Running], limits: Sequence[float | None] | None) -> list[tuple[int, CutOff, Any]]:
    """Kill the actors of calls that take longer than they may: numbers, errors and actors, no longer in `running`."""
    now, beyond = time.monotonic(), dict[int, CutOff]()
    for one in running.values():
        limit = None if limits is None or one.number is None else limits[one.number]
        if one.number is not None and limit is not None and now - one.since > limit:
            beyond[one.number] = CutOff(limit)
    # All who work at them: one that does what another was cut off from would be held by it for ever.
    ended = [reference for reference, one in running.items() if one.number in beyond]
    found = []
    for number, actor, _ in map(running.pop, ended):
        ray.kill(actor, no_restart=False)
        if number is not None:
            found.append((number, beyond[number], actor))
    return found


def _result(reference: Any) -> tuple[Any, bool]:
    """What a call gave, or its error, and whether the actor was lost over it."""
    try:
        return ray.get(reference, timeout=_FETCH), False
    except (RayActorError, ObjectLostError, GetTimeoutError) as error:
        return error, True
    except RayError as error:
        return error, False


def _hanging(running: dict[Any, _Running], taken: Sequence[float]) -> list[int]:
    """Calls that take so much longer than others did that their actors may be gone without a word; each once."""
    limit = max(_SLOW_SECONDS, _SLOW * median(taken)) if taken else _PATIENCE
    late = time.monotonic() - limit
    often = [one.number for one in running.values()]
    return [
        one.number
        for one in running.values()
        if one.number is not None and one.since < late and often.count(one.number) == 1
    ]
