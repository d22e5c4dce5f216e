"""Kronecker-factored Fisher information of a client's model on its own examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption
from fedmerge.registry import register
from fedmerge.seeding import torch_generator
from fedmerge.state import State
from fedmerge.statistics.layer_statistic import FisherStatistic
from fedmerge.statistics.measuring.measurable import (
    Measurable,
    check_parameter_shape,
    doubted_factors,
    doubted_parameters,
)
from fedmerge.statistics.measuring.squared_gradients import add_squares
from fedmerge.statistics.measuring.taps import LayerSums, Probe, factor, pieces, probe, stored_dtype
from fedmerge.statistics.measuring.weight_matrices import check_factor_shape, reordered_factor
from fedmerge.statistics.measuring.written_out import add_scales
from fedmerge.statistics.sending.soundness import semidefinite, squares
from fedmerge.statistics.statistic_type import Batches, Shapes
from fedmerge.training.report import TrainingReport

__all__ = ["FisherKfac"]


@register("fisher_kfac")
@dataclass(frozen=True)
class FisherKfac(FisherStatistic):
    """Factors A and G of every matrix layer, with ``F ~ A (x) G`` for its weight with the bias as last column.

    Martens and Grosse 2015 (arXiv 1503.05671) for linear layers, Grosse and Martens 2016 (arXiv 1602.01407)
    for convolutions. With rows a_t of inputs (unfolded patches, a final 1 where there is a bias) and g_t of
    gradients by the outputs, t over the T positions of an example (1 for a linear layer on plain inputs,
    steps for an LSTM, whose ``weight_ih`` and ``weight_hh`` are two layers):

    ``A = E_x sum_t a_t a_t^T``, under ``<weight>.A``, [d, d], or [groups, d, d] for a grouped convolution;
    ``G = E_x E_c (1/T) sum_t g_t g_t^T``, under ``<weight>.G``, [out, out] or [groups, out / groups, ...].

    The Fisher times a matrix V is then ``G V A``. On one example of a linear layer it is exact. Parameters
    that belong to no such layer (norms, embeddings, attention) come with their diagonal under ``<name>.diag``,
    as :class:`~fedmerge.statistics.FisherDiag` measures it. Takes ``4 (d^2 + out^2)`` bytes a layer.

    Its parameters are those of :class:`~fedmerge.statistics.layer_statistic.FisherStatistic`.

    Examples
    --------
    >>> model = nn.Linear(2, 3)
    >>> value = FisherKfac().measure(model, [(torch.randn(8, 2), torch.zeros(8, dtype=torch.long))], None)
    >>> value["weight.A"].shape, value["weight.G"].shape
    (torch.Size([3, 3]), torch.Size([3, 3]))
    """

    name: ClassVar[str] = "fisher_kfac"

    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Measure in one pass over the examples, in evaluation mode, on a copy."""
        generator = torch_generator(0, "sampled labels")
        probed: Probe | None = None
        inner, outer = LayerSums(), LayerSums()
        diagonals: dict[str, Tensor] = {}
        tasks = self.tasks(model, batches)
        count = 0
        for inputs, targets in self.limited(batches):
            if probed is None:
                probed = probe(model, inputs, self.selects, scales=True)
                shapes = dict(model.named_parameters())
                diagonals = {
                    name: torch.zeros_like(shapes[name], dtype=torch.float64)
                    for name in (*probed.others, *(name for layer in probed.scales for name in layer.names))
                }
            for x, y in pieces(probed, inputs, targets):
                with torch.enable_grad():
                    outputs, tapped = probed.forward(x)
                matrices, scales = tapped[: len(probed.layers)], tapped[len(probed.layers) :]
                inner.add_inputs(probed.layers, matrices)
                vectors = []
                for vector in self.vectors(tasks, x, outputs, y, generator):
                    gradients = probed.gradients(outputs, tapped, vector)
                    outer.add_gradients(probed.layers, gradients[: len(matrices)])
                    add_scales(diagonals, probed.scales, [taps.inputs for taps in scales], gradients[len(matrices) :])
                    vectors.append(vector)
                if probed.others:
                    add_squares(diagonals, probed.model, probed.others, x, torch.stack(vectors))
            count += len(targets)
        means = {f"{name}.A": factor(total / count) for name, total in inner.grams.items()}
        means |= {f"{name}.G": factor(total / inner.positions[name]) for name, total in outer.grams.items()}
        means |= {f"{name}.diag": total / count for name, total in diagonals.items()}
        return {name: value.to(stored_dtype(model)) for name, value in means.items()}

    def check_shapes(self, shapes: Shapes, state: State) -> None:
        """Both factors of a layer, of its size, or what is a parameter's alone, and never both of one."""
        for name, shape in shapes.items():
            parameter, _, part = name.rpartition(".")
            if part == "diag":
                check_parameter_shape(self.name, parameter, shape, state)
                if f"{parameter}.A" in shapes:
                    raise InvalidOption(f"statistic {self.name!r}: {parameter!r} has factors and a diagonal")
            elif part in ("A", "G"):
                check_factor_shape(self.name, parameter, part, shape, state)
                other = f"{parameter}.{'G' if part == 'A' else 'A'}"
                if other not in shapes:
                    raise InvalidOption(f"statistic {self.name!r}: {name!r} is there, {other!r} is missing")
                if len(shape) != len(shapes[other]) or shape[:-2] != shapes[other][:-2]:
                    raise InvalidOption(f"statistic {self.name!r}: factors of {parameter!r} are of other groups")
            else:
                raise InvalidOption(f"statistic {self.name!r}: {name!r} ends in none of .A, .G and .diag")

    def doubt(self, shapes: Shapes, state: State, model: Measurable) -> str | None:
        """Factors that are not the model's, or a parameter of which nothing is told."""
        split = {name.rpartition(".")[::2]: shape for name, shape in shapes.items()}
        factors = {(name, part): shape for (name, part), shape in split.items() if part != "diag"}
        doubt = doubted_factors(model, factors, state)
        if doubt is not None:
            return doubt
        held = {part for weight, _ in factors for part in model.matrices[weight].names}
        alone = {name for name, part in split if part == "diag"}
        if held & alone:
            return f"{min(held & alone)!r} is in the factors of its layer, and has a diagonal besides"
        return doubted_parameters(model, alone | held, self.selects)

    def of_inputs(self, name: str) -> bool:
        """A does, G shrinks as a client fits its data."""
        return name.endswith(".A")

    def check(self, value: State, state: State) -> None:
        """Of the layers' sizes, see :func:`~fedmerge.statistics.sending.soundness.semidefinite`."""
        self.received(value, state)

    def received(self, value: State, state: State) -> State:
        """Factors without negative eigenvalues."""
        self.check_shapes({name: tuple(tensor.shape) for name, tensor in value.items()}, state)
        return {
            name: (squares if name.endswith(".diag") else semidefinite)(self.name, name, tensor)
            for name, tensor in value.items()
        }

    def reordered(self, value: State, state: State, move: Callable[[State], State]) -> State:
        """Rows and columns of the factors follow the neurons."""
        moved = {}
        for name, tensor in value.items():
            parameter, _, part = name.rpartition(".")
            if part == "diag":
                moved[name] = move({parameter: tensor})[parameter]
            else:
                moved[name] = reordered_factor(parameter, part, tensor, state, move)
        return moved
