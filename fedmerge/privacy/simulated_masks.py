"""Secure aggregation by pairwise masks, simulated: the arithmetic of the protocol, and no cryptography.

The server adds up masked answers, and would learn the sum alone. But this process makes all masks itself, of answers
that it gets in the clear: it hides nothing from who runs it. It shows what merging by sums alone costs and breaks.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.errors import FedMergeError, InvalidOption, NoAnswer
from fedmerge.questions import Answer, Ask, Question
from fedmerge.statistics.sending.noise import NoisySums

__all__ = ["BITS", "Masked", "Occasion", "least_clients", "mask", "masked", "unmask"]

log = logging.getLogger("fedmerge")

BITS = 32
"""Behind the binary point: sums are whole multiples of 2**-32, modulo 2**64."""

_Layout = tuple[tuple[tuple[str, str, tuple[int, ...]], ...], ...]
_Numbers = NDArray[np.uint64]


@dataclass(frozen=True)
class Occasion:
    """When masks are used: each time has masks of its own.

    Parameters
    ----------
    round
        Of the merge.
    exchange
        Within the round, from 0.
    attempt
        Within the round, from 0: also one more each time that a client has failed and the others are asked again.
    """

    round: int = 0
    exchange: int = 0
    attempt: int = 0


@dataclass(frozen=True)
class Masked:
    """A client's answers as they are sent.

    Parameters
    ----------
    layout
        For each question the statistics' names and shapes, which the model tells anyway.
    values
        Sums in fixed point plus masks: uniform whatever the sums, for who lacks the other clients' secrets.
    occasion
        What the masks are of. Only answers of one occasion are added up.
    """

    layout: _Layout
    values: _Numbers
    occasion: Occasion = Occasion()


def masked(ask: Ask, round: int = 0, secret: int | None = None) -> Ask:
    """The same clients, asked so that only the sum of their answers is seen.

    Sums over examples, in fixed point modulo 2**64, plus a mask for each other client, which that client subtracts
    (Bonawitz et al. 2017): over all clients masks cancel, and what is left is the sum, exact but for rounding to
    2**-33 a client. Where a client fails the sum is noise, so the others are asked again with new masks, and what
    the first attempt brought is thrown away unread; whoever failed is not asked any more, for each time costs all
    others one more answer. One that answers wrongly cannot be told from the sum. Statistics are not compressed, for
    only then do they add up.

    This is a simulation of the protocol. The secret of each pair, which clients would agree on by a key exchange, is
    derived from one number here. A client that fails is found because it does not answer, rather than its masks being
    removed by secret sharing.

    Parameters
    ----------
    ask
        Reaches the clients.
    round
        Of the merge.
    secret
        Root of the secrets. The operating system draws one where not given: then no two merges share a mask, be they
        of one seed, of one round that is run again, or of two strategies side by side. The sum does not depend on it.

    Raises
    ------
    NoAnswer
        When asking: fewer than two clients are left, or fewer than share the noise.
    """
    root, exchanges, attempts = secrets.randbits(256) if secret is None else secret, count(), count()
    gone: set[int] = set()

    def asked(questions: Sequence[Question], clients: Sequence[int]) -> list[tuple[int, list[Answer]]]:
        plain = [replace(question, compression="none") for question in questions]
        present, exchange = sorted(set(clients) - gone), next(exchanges)
        while True:
            _check_enough(plain, present)
            now = Occasion(round, exchange, next(attempts))
            sent = dict(_sent(plain, ask(plain, present), present, root, now))
            if len(sent) == len(present):
                return [(present[0], unmask(list(sent.values()), plain))]
            failed = set(present) - set(sent)
            log.warning("clients %s failed under masks: the others are asked again", sorted(failed))
            gone.update(failed)
            present = sorted(sent)

    return asked


def _sent(
    questions: Sequence[Question],
    answers: Sequence[tuple[int, Sequence[Answer]]],
    clients: Sequence[int],
    secret: int,
    occasion: Occasion,
) -> Iterator[tuple[int, Masked]]:
    """What arrives at the server, of clients whose answers can be part of one sum; each counts once."""
    arrived: dict[int, Masked] = {}
    for client, client_answers in answers:
        if client not in clients or client in arrived:
            log.warning("client %d: an answer that nobody waits for is not opened", client)
            continue
        try:
            arrived[client] = mask(questions, client_answers, client, clients, secret, occasion)
        except InvalidOption as error:
            log.warning("client %d: its answer is left out: %s", client, error)
    usual = Counter(sent_sums.layout for sent_sums in arrived.values()).most_common(1)
    return ((client, sent_sums) for client, sent_sums in arrived.items() if sent_sums.layout == usual[0][0])


def least_clients(noises: Iterable[NoisySums | None]) -> int:
    """How many clients it takes to hide each one's answer: two, or as many as share the noise.

    Examples
    --------
    >>> least_clients([None, NoisySums(clip=1.0, noise_multiplier=1.0, sharers=5)])
    5
    """
    return max([2, *(noise.sharers for noise in noises if noise is not None)])


def _check_enough(questions: Sequence[Question], clients: Sequence[int]) -> None:
    least = least_clients(question.noise for question in questions)
    if len(clients) < least:
        raise NoAnswer(
            f"{len(clients)} clients are left to ask under masks, and {least} are needed to hide each one's answer: "
            "ask more clients, or share noise among fewer"
        )


def mask(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    client: int,
    clients: Sequence[int],
    secret: int,
    occasion: Occasion = Occasion(),
) -> Masked:
    """What one of `clients` sends.

    Parameters
    ----------
    questions, answers
        What was asked, and the client's own answers.
    client, clients
        Itself, and everybody who is asked.
    secret
        Root of the pairs' secrets.
    occasion
        Never the same twice under one secret, or the difference of two answers would be that of the sums.

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
        tensors = [
            (kind, name, t) for kind, value in sorted(answer.statistics.items()) for name, t in sorted(value.items())
        ]
        layout.append(tuple((kind, name, tuple(tensor.shape)) for kind, name, tensor in tensors))
        parts += [torch.tensor([answer.clients, answer.judged, answer.examples], dtype=torch.float64), losses]
        parts += [tensor.double().flatten() * answer.examples for _, _, tensor in tensors]
    sums = torch.cat([part.cpu() for part in parts]).numpy()
    if not bool((np.abs(sums) <= largest).all()):  # NaN as well
        raise InvalidOption(f"sums beyond {largest:g}, or not finite, do not fit under masks")
    values = np.rint(sums * 2.0**BITS).astype(np.int64).view(np.uint64)
    return Masked(tuple(layout), values + _masks(client, clients, len(values), secret, occasion), occasion)


def _masks(client: int, clients: Sequence[int], size: int, secret: int, occasion: Occasion) -> _Numbers:
    """Modulo 2**64: plus what is shared with clients behind, minus what is shared with those before."""
    total = np.zeros(size, dtype=np.uint64)
    for other in clients:
        if other != client:
            stream = _stream(secret, occasion, sorted(clients), sorted((client, other)), size)
            total = total + stream if other > client else total - stream
    return total


def _stream(secret: int, occasion: Occasion, clients: Sequence[int], pair: Sequence[int], size: int) -> _Numbers:
    """What a pair shares: SHAKE-256 (FIPS 202), which gives as many bits as are wanted, of all that they depend on."""
    when = f"{occasion.round}.{occasion.exchange}.{occasion.attempt}"
    key = f"fedmerge masks|{secret}|{when}|{','.join(map(str, clients))}|{pair[0]}-{pair[1]}"
    return np.frombuffer(hashlib.shake_256(key.encode()).digest(8 * size), dtype="<u8").astype(np.uint64)


def unmask(sent: Sequence[Masked], questions: Sequence[Question]) -> list[Answer]:
    """All clients' answers as one: what the server makes of what it was sent, by nothing but adding.

    Raises
    ------
    FedMergeError
        They are not of one occasion, as where one is late: what has other masks is not opened.
    """
    if len({sent_sums.occasion for sent_sums in sent}) != 1:
        raise FedMergeError(
            f"masked answers of {len({sent_sums.occasion for sent_sums in sent})} occasions do not add up"
        )
    total = np.sum([sent_sums.values for sent_sums in sent], axis=0, dtype=np.uint64)
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
