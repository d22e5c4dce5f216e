"""Low-rank pairs in a state: which tensors are the two factors of one update, told by names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

import torch
from torch import Tensor

from fedmerge.errors import AdapterError, InvalidOption
from fedmerge.state import State, accumulator_dtype

__all__ = ["LayerKind", "Pair", "check_pair_patterns", "factor_names", "factor_side", "find_pairs", "padded", "rank_of"]

LayerKind = Literal["linear", "convolution", "embedding"]

# peft's names, with and without the adapter's: fc.lora_A.default.weight, fc.lora_A.weight, words.lora_embedding_A.
_DENSE = re.compile(r"(?:(?P<layer>.+)\.)?lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_EMBEDDING = re.compile(r"(?:(?P<layer>.+)\.)?lora_embedding_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?")


@dataclass(frozen=True)
class Pair:
    """Two tensors whose product is a layer's update: ``scaling * B A``.

    Parameters
    ----------
    a, b
        Names of the factors. A is [r, in], or [r, in, *kernel] of a convolution; B is [out, r], or [out, r, 1, ...].
        Of an embedding A is [r, number of words] and B [width, r]: their product is the update transposed.
    layer
        Name of the layer that they belong to; empty where the whole model is one.
    kind
        What kind of layer that is.
    adapter
        Name of the adapter, where the tensors' names have it.

    Examples
    --------
    >>> state = {"fc.lora_A.default.weight": torch.ones(2, 3), "fc.lora_B.default.weight": torch.ones(4, 2)}
    >>> (pair,) = find_pairs(state)
    >>> pair.layer, pair.kind, pair.rank(state), pair.update(state, scaling=0.5).shape
    ('fc', 'linear', 2, torch.Size([4, 3]))
    """

    a: str
    b: str
    layer: str
    kind: LayerKind
    adapter: str = ""

    def rank(self, state: State) -> int:
        """r."""
        return len(state[self.a])

    def factors(self, state: State) -> tuple[Tensor, Tensor]:
        """B [out, r] and A [r, in] as matrices, in float32 or better; views where the types allow it.

        Raises
        ------
        AdapterError
            The shapes are not those of a pair.
        """
        a, b = state[self.a], state[self.b]
        self.check(a, b)
        return (
            b.reshape(len(b), len(a)).to(accumulator_dtype(b.dtype)),
            a.reshape(len(a), a[:1].numel()).to(accumulator_dtype(a.dtype)),
        )

    def tensors(self, b: Tensor, a: Tensor, like: State) -> dict[str, Tensor]:
        """The reverse of :meth:`factors`: tensors under their names, in the shapes of `like` but for the rank."""
        return {
            self.b: b.reshape(len(b), -1, *like[self.b].shape[2:]),
            self.a: a.reshape(-1, *like[self.a].shape[1:]),
        }

    def update(self, state: State, scaling: float = 1.0) -> Tensor:
        """The full update in the shape of the layer's weight: what all else here takes care not to make."""
        b, a = self.factors(state)
        whole = b @ a * scaling
        if self.kind == "embedding":
            return whole.T
        return whole.reshape(len(b), *state[self.a].shape[1:])

    def weight(self, names: Iterable[str]) -> str | None:
        """Name of the layer's own weight among `names`, which the update is added to; None where it is not there."""
        front = f"{self.layer}." if self.layer else ""
        known = set(names)
        return next((n for n in (f"{front}base_layer.weight", f"{front}weight") if n in known), None)

    def fits(self, a: Tensor, b: Tensor) -> bool:
        """Whether two tensors can be the factors of one update."""
        shapes = a.ndim >= 2 and b.ndim >= 2 and b.shape[1] == len(a) and all(size == 1 for size in b.shape[2:])
        return shapes and a.is_floating_point() and b.is_floating_point()

    def check(self, a: Tensor, b: Tensor) -> None:
        """Make sure that two tensors are the factors of one update.

        Raises
        ------
        AdapterError
            They are not.
        """
        if not self.fits(a, b):
            raise AdapterError(
                f"{self.a!r} {list(a.shape)} of {a.dtype} and {self.b!r} {list(b.shape)} of {b.dtype} are no low-rank "
                "pair: the first wants shape [r, in, ...], the second [out, r], or [out, r, 1, 1] beside a convolution"
            )


def find_pairs(state: State, patterns: Sequence[str] = (), *, lenient: bool = False) -> tuple[Pair, ...]:
    """The low-rank pairs among named tensors, in the order of their A.

    Parameters
    ----------
    state
        The tensors.
    patterns
        One's own names, each as ``"A:B"`` with at most one ``*`` on either side that stands for the same text, such as
        ``"*.down.weight:*.up.weight"``; besides peft's names, which are always known.
    lenient
        Whether what is no pair is passed over: states of which a part stays with the clients have single factors.

    Raises
    ------
    AdapterError
        A factor has no partner, or their shapes do not go together.
    InvalidOption
        A pattern is none, or fits no tensor.

    Examples
    --------
    >>> state = {"down.weight": torch.ones(1, 3), "up.weight": torch.ones(2, 1), "bias": torch.ones(2)}
    >>> [(pair.a, pair.b) for pair in find_pairs(state, ["down.weight:up.weight"])]
    [('down.weight', 'up.weight')]
    """
    matched = []
    for name in state:
        side, partner, layer, adapter, embedding = _named(name)
        if side and partner not in state:
            if lenient:
                continue
            other = "B" if side == "A" else "A"
            raise AdapterError(
                f"{name!r} is a low-rank factor whose {other}, {partner!r}, is not among the tensors: send both, or "
                "take a method that merges one of them alone"
            )
        if side == "A":
            matched.append(Pair(name, partner, layer, "embedding" if embedding else _kind(state[name]), adapter))
    for first, second in check_pair_patterns(patterns):
        own = [Pair(a, b, layer, _kind(state[a])) for a, b, layer in _matching(state, first, second)]
        if not own and not lenient:
            raise InvalidOption(
                f'pairs: no two tensors are called as "{first}:{second}" says; there are {_some(state)}'
            )
        matched += own
    for pair in matched if not lenient else ():
        pair.check(state[pair.a], state[pair.b])
    matched = [pair for pair in matched if pair.fits(state[pair.a], state[pair.b])]
    order = {name: place for place, name in enumerate(state)}
    return tuple(sorted(dict.fromkeys(matched), key=lambda pair: order[pair.a]))


def check_pair_patterns(patterns: Sequence[str]) -> list[tuple[str, str]]:
    """Patterns of pairs, each divided into that of A and that of B.

    Raises
    ------
    InvalidOption
        One is no such pattern.
    """
    if isinstance(patterns, str):
        raise InvalidOption(f'pairs must be a list, such as ["*.down.weight:*.up.weight"], got {patterns!r}')
    divided = []
    for pattern in patterns:
        first, _, second = str(pattern).partition(":")
        stars = first.count("*"), second.count("*")
        if not first or not second or stars not in ((0, 0), (1, 1)):
            raise InvalidOption(
                f"pairs: {pattern!r} must name the factor A [r, in] and B [out, r], with one * in each or in neither: "
                '"*.down.weight:*.up.weight"'
            )
        divided.append((first.strip(), second.strip()))
    return divided


def factor_names(names: Iterable[str], side: Literal["A", "B"], patterns: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of factors of one side, whether or not the others are there too.

    A is the factor that starts with random numbers, B the one that starts at zero: of embeddings these are, by their
    names, the other way around.

    Examples
    --------
    >>> factor_names(["fc.lora_B.default.weight", "words.lora_embedding_A", "fc.bias"], "B")
    ('fc.lora_B.default.weight', 'words.lora_embedding_A')
    """
    own = [divided[side == "B"] for divided in check_pair_patterns(patterns)]
    chosen = []
    for name in names:
        named, _, _, _, embedding = _named(name)
        starts = named if not embedding else {"A": "B", "B": "A"}[named]
        if starts == side or any(_stem(name, one) is not None for one in own):
            chosen.append(name)
    return tuple(chosen)


def factor_side(name: str) -> str:
    """``"A"`` or ``"B"`` of a tensor that has one of peft's names for a factor; empty of any other.

    Examples
    --------
    >>> factor_side("fc.lora_B.default.weight"), factor_side("fc.weight")
    ('B', '')
    """
    return _named(name)[0]


def rank_of(b: Tensor, a: Tensor) -> int:
    """How many slices of a pair of matrices [out, r] and [r, in] are held: those behind the last that is not zero are
    only there to fill up.

    Examples
    --------
    >>> rank_of(torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[1.0], [2.0], [0.0]]))
    2
    """
    held = (b != 0).any(0) | (a != 0).any(1)
    places = held.nonzero()
    return int(places[-1]) + 1 if len(places) else 0


def padded(state: State, pairs: Iterable[Pair], like: State) -> dict[str, Tensor]:
    """`state`, its pairs filled up with zeros to the ranks that they have in `like`: the updates are the same.

    A pair of a larger rank, or of other shapes besides, stays as it is; a factor without the other is filled up too.

    Examples
    --------
    >>> small = {"lora_A.weight": torch.ones(1, 2), "lora_B.weight": torch.ones(3, 1)}
    >>> like = {"lora_A.weight": torch.ones(2, 2), "lora_B.weight": torch.ones(3, 2)}
    >>> padded(small, find_pairs(like), like)["lora_B.weight"].tolist()
    [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    """
    filled = dict(state)
    for pair in pairs:
        a, b, rank = state.get(pair.a), state.get(pair.b), len(like[pair.a])
        # What else a client may have sent, up to what is no tensor at all, is told by the checks of updates.
        if (a is not None and not _plain(a)) or (b is not None and not _plain(b)):
            continue
        if a is not None and b is not None and not pair.fits(a, b):
            continue
        if a is not None and a.ndim > 1 and 0 < len(a) < rank:
            filled[pair.a] = torch.cat([a, a.new_zeros(rank - len(a), *a.shape[1:])])
        if b is not None and b.ndim > 1 and 0 < b.shape[1] < rank:
            filled[pair.b] = torch.cat([b, b.new_zeros(len(b), rank - b.shape[1], *b.shape[2:])], 1)
    return filled


def _plain(tensor: object) -> TypeGuard[Tensor]:
    return isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta


def _named(name: str) -> tuple[str, str, str, str, bool]:
    """Side, partner, layer and adapter of a tensor with one of peft's names, and whether it is of an embedding."""
    for pattern, embedding in ((_DENSE, False), (_EMBEDDING, True)):
        match = pattern.fullmatch(name)
        if match is not None:
            side, start = match["side"], match.start("side")
            partner = name[:start] + ("B" if side == "A" else "A") + name[start + 1 :]
            return side, partner, match["layer"] or "", match["adapter"] or "", embedding
    return "", "", "", "", False


def _kind(a: Tensor) -> LayerKind:
    return "convolution" if a.ndim > 2 else "linear"


def _stem(name: str, pattern: str) -> str | None:
    """What the star of a pattern stands for; None where the name does not fit."""
    front, star, back = pattern.partition("*")
    if not star:
        return "" if name == pattern else None
    fits = name.startswith(front) and name.endswith(back) and len(name) >= len(front) + len(back)
    return name[len(front) : len(name) - len(back)] if fits else None


def _matching(state: State, first: str, second: str) -> list[tuple[str, str, str]]:
    stems = {name: stem for name in state if (stem := _stem(name, first)) is not None}
    pairs = [(name, second.replace("*", stem), stem) for name, stem in stems.items()]
    return [(a, b, stem.rstrip(".")) for a, b, stem in pairs if b in state]


def _some(state: Mapping[str, Tensor]) -> str:
    names = list(state)[:5]
    return ", ".join(map(repr, names)) + (" ..." if len(state) > 5 else "")
