"""Language modelling: the next token at every position, padding left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from fedmerge.errors import TaskError
from fedmerge.registry import register
from fedmerge.tasks.classification import Classification

__all__ = ["LanguageModel"]


@register("language_model")
@dataclass(frozen=True)
class LanguageModel(Classification):
    """The next token at every position, cross-entropy of a softmax over the vocabulary, judged by perplexity.

    Outputs are scores [B, T, V], targets token ids [B, T]: the inputs one position on, or with ``shift`` the inputs
    themselves. What a model returns beside a tensor is asked for its ``logits``, as the models of transformers have
    them.

    Parameters
    ----------
    padding
        The token that fills up short texts: it is no target.
    shift
        Whether targets are the inputs' own tokens, so that the scores at position t are of the token at t + 1.
    class_axis, ignore_index, label_smoothing, where_unclear, class_weights, metrics
        See :class:`~fedmerge.tasks.Classification`; the class axis is the last, the metric the perplexity.

    Examples
    --------
    >>> import torch
    >>> task, scores = LanguageModel(padding=0, shift=True), torch.zeros(1, 4, 5)
    >>> task.labels(scores, torch.tensor([[3, 1, 2, 0]])).tolist()  # after 3 and 1, not after 2
    [2]
    >>> round(task.figures(task.sums(scores, torch.tensor([[3, 1, 2, 0]])))["perplexity"], 4)
    5.0
    """

    usual_metrics: ClassVar[tuple[str, ...]] = ("perplexity",)

    class_axis: int | None = -1
    padding: int | None = None
    shift: bool = False

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        """The scores."""
        outputs = super().forward(model, inputs)
        return outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", outputs)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Tokens of the vocabulary, a target for each position."""
        if targets.is_floating_point():
            raise TaskError(f"targets of {targets.dtype} are no tokens: pass whole numbers")
        super().check(outputs, targets)

    def next_tokens(self, targets: Tensor) -> Tensor:
        """The token that follows each position, ``ignore_index`` where none does, or padding.

        Examples
        --------
        >>> import torch
        >>> LanguageModel(padding=0, shift=True).next_tokens(torch.tensor([[5, 6, 0]]))
        tensor([[   6, -100, -100]])
        """
        if self.shift:
            targets = targets.roll(-1, dims=-1)
            targets[..., -1] = self.ignore_index  # nothing follows the last
        return targets if self.padding is None else targets.masked_fill(targets == self.padding, self.ignore_index)

    def _rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, V], and the next tokens [n]."""
        return super()._rows(outputs, self.next_tokens(targets))
