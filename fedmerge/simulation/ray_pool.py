"""A pool of Ray actors that survives the loss of any of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from fedmerge.errors import FedMergeError

__all__ = ["Call", "Pool"]

Call = Callable[[Any], Any]
"""Starts one piece of work on an actor and gives the reference of its result."""

_ATTEMPTS = 3
_PATIENCE = 300.0  # seconds; restarting a lost actor takes as long as importing torch


class Pool:
    """Actors that may be lost at any moment: their work is done again by others.

    Work must be a pure function of its arguments. An actor needs a method ``ping`` that answers at once.

    Parameters
    ----------
    actors
        Handles of actors that Ray restarts, so that they stay valid.
    """

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)

    def __len__(self) -> int:
        return len(self._actors)

    def run(self, calls: Sequence[Call]) -> Iterator[Any]:
        """Results in the order of `calls`, or the error of one that failed; no more of them at once than actors.

        Raises
        ------
        FedMergeError
            All actors are lost, and none comes back.
        """
        waiting, idle = deque(range(len(calls))), list(self._actors)
        running: dict[Any, tuple[int | None, Any]] = {}
        attempts, finished = [0] * len(calls), {}
        position = 0
        while position < len(calls):
            while idle and waiting:
                number, actor = waiting.popleft(), idle.pop()
                attempts[number] += 1
                running[calls[number](actor)] = number, actor
            ready, _ = ray.wait(list(running), num_returns=1, timeout=_PATIENCE)
            if not ready and all(number is None for number, _ in running.values()):
                raise FedMergeError(f"all {len(self._actors)} workers on Ray are lost and none came back: see its logs")
            for reference in ready:
                done, actor = running.pop(reference)
                lost = False
                try:
                    result = ray.get(reference)
                except RayActorError as error:
                    result, lost = error, True
                except RayError as error:
                    result = error
                if lost:  # it is back when it answers
                    running[actor.ping.remote()] = None, actor
                    if done is not None and attempts[done] < _ATTEMPTS:
                        waiting.appendleft(done)
                        continue
                else:
                    idle.append(actor)
                if done is not None:
                    finished[done] = result
            while position in finished:
                yield finished.pop(position)
                position += 1
