"""Domains: the same classes under other conditions, such as turned, noisy or blurred images, one for each client.

Client i has domain ``i % D`` of D, in what it trains on and in what it holds out. Of the test set each domain has an
equal share, drawn by the seed, so test accuracy is the mean over domains; ``accuracy_by_domain`` in a row of a record
tells it for each.
Inputs are changed as a model sees them, after they have been normalised. What is random in a domain is drawn by the
seed for each example, so that an example looks the same in every round, in every method and on every worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedmerge.data.domain_kinds import Domain
from fedmerge.data.example_sets import Batch, Examples, TensorExamples
from fedmerge.errors import DataError, InvalidOption
from fedmerge.inputs import tensors_of
from fedmerge.lookup.method_names import parse_method
from fedmerge.registry import build
from fedmerge.seeding import generator, integer_seed

__all__ = ["domain_name", "domains_of_tests", "in_domains", "make_domains"]


def make_domains(written: Sequence[str]) -> tuple[Domain, ...]:
    """Domains by name, with options in parentheses; a set such as ``rotated`` stands for all that are in it.

    Raises
    ------
    UnknownName
        No domain, or no option of one, is called so.
    InvalidOption
        Something is added by ``+``, an option is out of range, or one domain stands there twice.

    Examples
    --------
    >>> [domain_name(one) for one in make_domains(["original", "rotation(degrees=45)"])]
    ['original', 'rotation(degrees=45.0)']
    >>> len(make_domains(["rotated"])), len(make_domains(["rotated(steps=8)"]))
    (4, 8)
    """
    domains: list[Domain] = []
    for text in written:
        part, *others = parse_method(text)
        if others:
            raise InvalidOption(f"domain {text!r}: write one domain alone, without +")
        made = build("domain", part.name, part.options)
        if not isinstance(made, Domain):
            raise InvalidOption(f"domain {part.name!r}: make it a subclass of fedmerge.data.domain_kinds.Domain")
        domains += made.spread()
    twice = next((domain for domain in domains if domains.count(domain) > 1), None)
    if twice is not None:
        raise InvalidOption(f"data.domains names {domain_name(twice)} twice: name each once")
    return tuple(domains)


def domain_name(domain: Domain) -> str:
    """How a domain is written, for records and pictures."""
    options = ",".join(f"{key}={value}" for key, value in vars(domain).items())
    name = domain.name or type(domain).__name__
    return f"{name}({options})" if options else name


def domains_of_tests(examples: int, domains: int, seed: int) -> Tensor:
    """The domain of each test example, int64 [examples]: equal shares, which ones drawn by the seed.

    Examples
    --------
    >>> domains_of_tests(9, 3, seed=0).bincount().tolist()
    [3, 3, 3]
    """
    return torch.from_numpy(generator(seed, "domains of the test set").permutation(examples) % domains)


def in_domains(
    examples: Examples, domains: Sequence[Domain], which: Tensor, rows: Tensor, seed: int, purpose: str
) -> Examples:
    """Examples as they look in their domains: changed at once where they are in memory, else as they are read.

    Parameters
    ----------
    examples
        Images [n, channels, height, width] with their labels.
    domains
        The domains.
    which
        int64 [n]: the domain of each example.
    rows
        int64 [n]: its row in the data set, which names what is drawn for it.
    seed, purpose
        Of what is drawn; the purpose keeps training and test sets apart.

    Raises
    ------
    DataError
        Inputs are no images.
    """
    seeds = rows + integer_seed(seed, f"domains, {purpose}") // 2
    made = _InDomains(examples, tuple(domains), which, seeds)
    first = examples.first(1)
    if first is not None:
        _check_images(first[0], examples.what)
    if examples.tensors is None or not len(examples):
        return made if len(examples) else examples
    x, y = made.take(np.arange(len(examples)))
    return TensorExamples(x, y, examples.what)


@dataclass(eq=False)
class _InDomains(Examples):
    """Examples of which each looks as its domain has it."""

    examples: Examples
    domains: tuple[Domain, ...]
    which: Tensor
    seeds: Tensor

    def __post_init__(self) -> None:
        self.what = self.examples.what

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Batch:
        """These rows, changed."""
        inputs, targets = self.examples.take(rows)
        at = torch.from_numpy(rows)
        which, seeds = self.which[at], self.seeds[at]
        changed = inputs.clone()
        for number in sorted(set(which.tolist())):
            mine = which == number
            changed[mine] = self.domains[number].change(inputs[mine], seeds[mine].tolist())
        return changed, targets

    def subset(self, rows: Tensor) -> Examples:
        """Some of them, each in its domain."""
        return _InDomains(self.examples.subset(rows), self.domains, self.which[rows], self.seeds[rows])


def _check_images(inputs: object, what: str) -> None:
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or not inputs.is_floating_point():
        shapes = ", ".join(str(list(tensor.shape[1:])) for tensor in tensors_of(inputs))
        raise DataError(
            f"{what}: domains are for images [channels, height, width], and an example is {shapes}: leave out "
            "data.domains, or choose a data set of images"
        )
