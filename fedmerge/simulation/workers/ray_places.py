"""Room for Ray actors: processors reserved for all of them at once, or shared where there are not enough."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fedmerge.errors import ConfigError

__all__ = ["Places"]

log = logging.getLogger("fedmerge")

_PATIENCE = 5.0  # seconds; free processors are reserved at once, and those of a grid just closed soon after


class Places:
    """Where actors run.

    An actor that asks for a processor which is not free waits for ever and says nothing, so processors are reserved
    first. Where others hold them, such as the workers of another grid, these share them: they reserve none.

    Parameters
    ----------
    count
        Number of actors; None takes one per CPU of the cluster.

    Raises
    ------
    ConfigError
        There are GPUs, and others hold them: who shares no GPU would compute on none without a word.
    """

    def __init__(self, count: int | None) -> None:
        cluster = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self.count = count or max(1, int(cluster.get("CPU", 1)))
        gpus = cluster.get("GPU", 0.0) / self.count
        self._each = {"CPU": 1.0, **({"GPU": min(gpus, 1.0)} if gpus else {})}
        self._group: PlacementGroup | None = placement_group([self._each] * self.count, strategy="SPREAD")
        if self._group.wait(_PATIENCE):
            return
        self.free()
        wanting = "1 worker on Ray wants" if self.count == 1 else f"{self.count} workers on Ray want"
        each = "" if self.count == 1 else " each"
        numbers = f"{wanting} {_told(self._each)}{each}, and of {_told(cluster)} only {_free()} free"
        if gpus:
            raise ConfigError(f"{numbers}: close the grid that holds the others, or take fewer workers")
        log.warning("%s: they share processors with whoever holds the others", numbers)

    def options(self, number: int) -> dict[str, Any]:
        """Options of the actor with this number."""
        if self._group is None:
            return {"num_cpus": 0, "scheduling_strategy": "SPREAD"}
        where = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number)
        return {"num_cpus": 1, "num_gpus": self._each.get("GPU", 0), "scheduling_strategy": where}

    def free(self) -> None:
        """Give them back."""
        if self._group is not None:
            remove_placement_group(self._group)
        self._group = None


def _free() -> str:
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    return f"{_told(free)} {'is' if free.get('CPU') == 1 and not free.get('GPU') else 'are'}"


def _told(resources: dict[str, float]) -> str:
    """CPUs and GPUs in words; no GPUs are not mentioned."""
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    told = f"{cpus:g} processor{'' if cpus == 1 else 's'}"
    return f"{told} and {gpus:.3g} GPUs" if gpus else told
