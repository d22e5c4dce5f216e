"""How good a global model of an experiment is: on its test set, on each domain, and on inputs with a trigger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from fedmerge.data.domains import domain_name, domains_of_tests, make_domains
from fedmerge.models.resize import resize
from fedmerge.simulation.runs.experiment import Experiment
from fedmerge.state import State
from fedmerge.strategies import from_arrays
from fedmerge.tasks import Classification, Reading, Task
from fedmerge.training.device import choose_device
from fedmerge.training.judged import Judged, judge
from fedmerge.training.local import batches
from fedmerge.training.model_on_data import outputs_of

__all__ = ["Judge"]

Served = Callable[[nn.Module], nn.Module]


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


@dataclass(frozen=True)
class Judge:
    """Judges the global models of one experiment; no client takes part.

    Parameters
    ----------
    experiment
        Whose test set, model and task it is.
    """

    experiment: Experiment

    def test(self, arrays: ArrayRecord, served: Served = _as_it_is) -> Judged:
        """Loss, accuracy where there is one, and the task's metrics of a global model on the test set.

        `served` makes of the model what it is used as, see :meth:`~fedmerge.strategies.MergeStrategy.served`.
        """
        return judge(
            served(self._judged(from_arrays(arrays))),
            self.experiment.dataset.test,
            what="the test set",
            task=self.experiment.task,
        )

    def domain_accuracies(self, arrays: ArrayRecord, served: Served = _as_it_is) -> dict[str, float]:
        """Accuracy of a global model on each domain's share of the test set; nothing without domains.

        Nothing with personal parts either: no model is whole without a client's own.
        """
        domains = make_domains(self.experiment.config.data.domains)
        if not domains or self.experiment.config.personal:
            return {}
        whole, model, by_domain = self.experiment.whole_dataset.test, served(self._judged(from_arrays(arrays))), {}
        which = domains_of_tests(len(whole), len(domains), self.experiment.seed)
        which[: self.experiment.config.server_examples] = -1  # those that the server holds
        for number, domain in enumerate(domains):
            mine = whole.subset((which == number).nonzero().flatten())
            by_domain[domain_name(domain)] = judge(model, mine, what="the test set", task=self.experiment.task).accuracy
        return by_domain

    def attack_success(self, arrays: ArrayRecord, served: Served = _as_it_is) -> float | None:
        """Share of the test inputs with a trigger that are taken for what the attack wants; None where it has none."""
        hostile = self.experiment.hostile
        if hostile is None or self.experiment.config.personal:
            return None
        judged, model = Judged(), served(self._judged(from_arrays(arrays)))
        for batch in self.experiment.dataset.test.in_order():
            shown = hostile.attack.triggered(*batch)
            if shown is None:
                return None
            inputs, target = shown
            judged += judge(model, inputs, torch.full((len(inputs),), target))
        return judged.accuracy

    @torch.no_grad()
    def predictions(self, state: State) -> tuple[Task, Tensor, Tensor]:
        """The task, what a model expects on the test inputs (probabilities of classes, or numbers, in the outputs'
        shape), and their targets."""
        model = self._judged(state).eval()
        reading = Reading(chosen_task := self.experiment.task or Classification())
        expected, targets = [], []
        for inputs, labels in batches(self.experiment.dataset.test, device=next(model.parameters()).device):
            outputs = outputs_of(model, inputs, task=chosen_task)
            task = reading(outputs, labels, None, model, inputs)
            expected.append(task.expected(outputs, labels).cpu())
            targets.append(labels.cpu())
        return task, torch.cat(expected), torch.cat(targets)

    def _judged(self, state: State) -> nn.Module:
        # Frozen tensors may not be there; and a merged model may be wider than those that clients began with.
        return resize(self._judge, {**self._judge.state_dict(), **state})

    @cached_property
    def _judge(self) -> nn.Module:
        return self.experiment.model_fn().to(choose_device(self.experiment.config.device))
