"""Pairwise masks: the server learns the sum of its clients' answers, and of no single one anything at all."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.errors import FedMergeError, InvalidOption
from fedmerge.questions import Answer, Ask, Question
from fedmerge.seeding import integer_seed

__all__ = ["BITS", "Masked", "mask", "masked", "unmask"]

log = logging.getLogger("fedmerge")

BITS = 32
"""Behind the binary point: sums are whole multiples of 2**-32, modulo 2**64."""

_Layout = tuple[tuple[tuple[str, str, tuple[int, ...]], ...], ...]
_Numbers = NDArray[np.uint64]


@dataclass(frozen=True)
class Masked:
    """A client's answers as they are sent.

    Parameters
    ----------
    layout
        For each question the statistics' names and shapes, which the model tells anyway.
    values
        Sums in fixed point plus masks: uniform whatever the sums, for who lacks the other clients' secrets.
    """

    layout: _Layout
    values: _Numbers


def masked(ask: Ask, seed: int) -> Ask:
    """The same clients, asked so that only the sum of their answers is seen.

    Sums over examples, in fixed point modulo 2**64, plus a mask for each other client, which that client subtracts
    (Bonawitz et al. 2017): over all clients masks cancel, and what is left is the sum, exact but for rounding to
    2**-33 a client. Where a client fails the sum is noise, so the others are asked once more with new masks; one that
    answers wrongly cannot be told from the sum. Statistics are not compressed, for only then do they add up.

    This is a simulation of the protocol: the secret of each pair, which clients would agree on by a key exchange, is
    derived from `seed` here, a client that fails is found because it does not answer, rather than its masks being
    removed by secret sharing, and NumPy's generator stands for a cryptographic one.

    Parameters
    ----------
    ask
        Reaches the clients.
    seed
        Root of the secrets.

    Raises
    ------
    FedMergeError
        When asking: fewer than two clients are left, or fewer than share the noise.
    """
    rounds = count()

    def asked(questions: Sequence[Question], clients: Sequence[int]) -> list[tuple[int, list[Answer]]]:
        plain = [replace(question, compression="none") for question in questions]
        present = sorted(set(clients))
        while True:
            _check_enough(plain, present)
            number = next(rounds)
            sent = dict(_sent(plain, ask(plain, present), present, integer_seed(seed, "masks", number)))
            if len(sent) == len(present):
                return [(present[0], unmask(list(sent.values()), plain))]
            log.warning("clients %s failed under masks: the others are asked again", sorted(set(present) - set(sent)))
            present = sorted(sent)

    return asked


def _sent(
    questions: Sequence[Question], answers: Sequence[tuple[int, Sequence[Answer]]], clients: Sequence[int], seed: int
) -> Iterator[tuple[int, Masked]]:
    """What arrives at the server, of clients whose answers can be part of one sum."""
    arrived = []
    for client, given in answers:
        try:
            arrived.append((client, mask(questions, given, client, clients, seed)))
        except InvalidOption as error:
            log.warning("client %d: its answer is left out: %s", client, error)
    usual = Counter(one.layout for _, one in arrived).most_common(1)
    return ((client, one) for client, one in arrived if client in clients and one.layout == usual[0][0])


def _check_enough(questions: Sequence[Question], clients: Sequence[int]) -> None:
    least = max([2, *(question.noise.sharers for question in questions if question.noise is not None)])
    if len(clients) < least:
        raise FedMergeError(
            f"{len(clients)} clients are left to ask under masks, and {least} are needed to hide each one's answer: "
            "ask more clients, or share noise among fewer"
        )


def mask(
    questions: Sequence[Question], answers: Sequence[Answer], client: int, clients: Sequence[int], seed: int
) -> Masked:
    """What one of `clients` sends.

    Parameters
    ----------
    questions, answers
        What was asked, and the client's own answers.
    client, clients
        Itself, and everybody who is asked.
    seed
        Root of the pairs' secrets; a new one each time, or the difference of two answers would show.

    Raises
    ------
    InvalidOption
        An answer that cannot be part of a sum: of another form, not finite, too large, without the noise asked for.
    """
    if len(answers) != len(questions):
        raise InvalidOption(f"{len(answers)} answers to {len(questions)} questions")
    largest = 2.0 ** (62 - BITS) / len(clients)
    parts, layout = [], []
    for question, answer in zip(questions, answers, strict=True):
        if answer.noise != question.noise or answer.losses.shape != (len(question.points),):
            raise InvalidOption("an answer of another form than its question")
        # A diverged point is simply not chosen, whatever its loss.
        losses = answer.losses.nan_to_num(largest).clamp(-largest, largest)
        found = [
            (kind, name, t) for kind, value in sorted(answer.statistics.items()) for name, t in sorted(value.items())
        ]
        layout.append(tuple((kind, name, tuple(tensor.shape)) for kind, name, tensor in found))
        parts += [torch.tensor([answer.clients, answer.judged, answer.examples], dtype=torch.float64), losses]
        parts += [tensor.double().flatten() * answer.examples for _, _, tensor in found]
    sums = torch.cat([part.cpu() for part in parts]).numpy()
    if not bool((np.abs(sums) <= largest).all()):  # NaN as well
        raise InvalidOption(f"sums beyond {largest:g}, or not finite, do not fit under masks")
    values = np.rint(sums * 2.0**BITS).astype(np.int64).view(np.uint64)
    return Masked(tuple(layout), values + _masks(client, clients, len(values), seed))


def _masks(client: int, clients: Sequence[int], size: int, seed: int) -> _Numbers:
    """Modulo 2**64: plus what is shared with clients behind, minus what is shared with those before."""
    total = np.zeros(size, dtype=np.uint64)
    for other in clients:
        if other != client:
            pair = integer_seed(seed, "pair", min(client, other), max(client, other))
            stream = np.random.Philox(pair).random_raw(size)
            total = total + stream if other > client else total - stream
    return total


def unmask(sent: Sequence[Masked], questions: Sequence[Question]) -> list[Answer]:
    """All clients' answers as one: what the server makes of what it was sent, by nothing but adding."""
    total = np.sum([one.values for one in sent], axis=0, dtype=np.uint64)
    sums = torch.from_numpy(total.view(np.int64) / 2.0**BITS)
    answers, at = [], 0
    for question, entries in zip(questions, sent[0].layout, strict=True):
        clients, judged, examples = (round(float(number)) for number in sums[at : at + 3])
        losses = sums[at + 3 : at + 3 + len(question.points)]
        at += 3 + len(question.points)
        statistics: dict[str, dict[str, torch.Tensor]] = {}
        for kind, name, shape in entries:
            size = torch.Size(shape).numel()
            statistics.setdefault(kind, {})[name] = sums[at : at + size].reshape(shape) / max(1, examples)
            at += size
        answers.append(Answer(losses, judged, examples, statistics, clients, question.noise))
    return answers
