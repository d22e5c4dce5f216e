"""The character-level language model of federated learning's Shakespeare experiments."""

from __future__ import annotations

from torch import Tensor, nn

from fedmerge.errors import ModelError
from fedmerge.models.checks import whole
from fedmerge.registry import register

__all__ = ["CharLSTM"]


@register("char_lstm", kind="model")
class CharLSTM(nn.Module):
    """Embedding, stacked LSTM, and one linear layer that predicts the next character at every position.

    The network of McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", arXiv:1602.05629, section 3, whose LSTM layers have 256 units; here 128 by default, for speed.

    Parameters
    ----------
    input_shape
        (length,) of one sequence of character ids.
    num_classes
        Size V of the alphabet: ids lie in 0 .. V-1.
    embedding
        Size of a character's vector.
    hidden
        Units of each LSTM layer.
    layers
        LSTM layers.

    Raises
    ------
    ModelError
        The input is no sequence.
    InvalidOption
        An option is no positive whole number.

    Examples
    --------
    >>> import torch
    >>> model = CharLSTM((20,), 80, hidden=16)
    >>> model(torch.zeros(2, 20, dtype=torch.int64)).shape
    torch.Size([2, 20, 80])
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        embedding: int = 8,
        hidden: int = 128,
        layers: int = 2,
    ) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ModelError(
                f"model 'char_lstm' wants sequences of shape (length,) that hold character ids, "
                f"the input shape given is {input_shape}. Choose a text data set, or another model."
            )
        embedding = whole("char_lstm", "embedding", embedding)
        hidden = whole("char_lstm", "hidden", hidden)
        layers = whole("char_lstm", "layers", layers)
        self.embedding = nn.Embedding(num_classes, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.output = nn.Linear(hidden, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of character ids [B, T] (int64)."""
        states, _ = self.lstm(self.embedding(tokens))
        logits: Tensor = self.output(states)
        return logits
