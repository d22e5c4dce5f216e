"""Answers of many clients made into one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fedmerge.errors import InvalidOption, NoAnswer
from fedmerge.questions.question import Answer, Question, checked
from fedmerge.questions.trust import Trust, evened, judged_losses, shares
from fedmerge.statistics.sending.laws import breaches

__all__ = ["added_up", "pooled", "sifted"]

log = logging.getLogger("fedmerge")

Given = Sequence[tuple[int, Sequence[Answer]]]


def pooled(questions: Sequence[Question], answers: Given, trust: Trust | None = None) -> list[Answer]:
    """For each question, the answers of all clients as one: sums of losses, means over all examples.

    A client with an answer that cannot be one is left out with a warning. Every number of the others is believed,
    unless `trust` says otherwise.

    Raises
    ------
    NoAnswer
        No client's answers can be used.
    """
    trust = trust or Trust("mean", "mean")
    return added_up(questions, sifted(questions, answers, trust)[0], trust)


def sifted(
    questions: Sequence[Question],
    answers: Given,
    trust: Trust,
    told: Mapping[int, float] | None = None,
    asked: Collection[int] | None = None,
) -> tuple[list[list[Answer]], dict[int, str]]:
    """The answers that can be used, checked, and by client the reasons why others cannot.

    Parameters
    ----------
    questions, answers
        What was asked, and what came, by client.
    trust
        What there is to know of losses.
    told
        How many examples each client told of in training. Where they are less than most clients answer for they are no
        numbers of examples, and bound nothing.
    asked
        Who was asked, where that is known; answers of others are ignored with a warning.
    """
    lowest = trust.lowest_loss or 0.0
    answers = [(client, given) for client, given in answers if asked is None or client in asked]
    times, known = Counter(client for client, _ in answers), _believed(answers, told or {})
    together = len(answers) == 1  # it may be the sum of several clients', as one of many may not
    refused, good = {client: f"it answered {n} times" for client, n in times.items() if n > 1}, []
    for client, given in answers:
        if client in refused:
            continue
        try:
            found = checked(questions, given, known.get(client), lowest)
            if not together and any(answer.clients != 1 for answer in found):
                raise InvalidOption("an answer in the name of several clients")
            good.append((client, found))
        except InvalidOption as error:
            refused[client] = str(error)
    forms = Counter(_form(found) for _, found in good)
    for client, found in good:
        if _form(found) != forms.most_common(1)[0][0]:
            refused[client] = "tensors with other names or shapes than most clients'"
    if not together:
        believed = [(client, found) for client, found in good if client not in refused]
        refused |= _unlawful(questions, believed, trust.suspects(len(believed), least=1))
    for client, reason in sorted(refused.items()):
        log.warning("client %d: its answer is left out: %s", client, reason[:500])
    return [found for client, found in good if client not in refused], refused


def _unlawful(questions: Sequence[Question], good: Given, liars: int) -> dict[int, str]:
    """Clients whose sums break an identity that all others' keep but those of the liars, each with the reason."""
    found: dict[int, str] = {}
    for number, question in enumerate(questions):
        for kind in question.needs if question.noise is None else ():
            values = [given[number].statistics[kind.name] for _, given in good]
            for place, broken in breaches([kind.identities(value) for value in values], liars).items():
                reason = f"statistic {kind.name!r}: all others' numbers keep an identity that its own break: {broken}"
                found.setdefault(good[place][0], reason)
    return found


def _form(given: Sequence[Answer]) -> tuple[object, ...]:
    return tuple(
        (kind, name, tuple(tensor.shape))
        for answer in given
        for kind, value in sorted(answer.statistics.items())
        for name, tensor in sorted(value.items())
    )


def _believed(answers: Given, told: Mapping[int, float]) -> Mapping[int, float]:
    """What clients told of in training, where most clients answer for no more."""
    claims = [(told[c], given[0].judged + given[0].examples) for c, given in answers if c in told and given]
    more = sum(claimed > most for most, claimed in claims)
    return told if 2 * more <= len(claims) else {}


def added_up(questions: Sequence[Question], good: Sequence[Sequence[Answer]], trust: Trust) -> list[Answer]:
    """For each question, the answers of all clients as one.

    Raises
    ------
    NoAnswer
        There are none.
    """
    if not good:
        raise NoAnswer("no client answered a question about the merged model with anything that can be used")
    totals = [_sum([given[i] for given in good], trust, question) for i, question in enumerate(questions)]
    totals = _judged(totals, good, trust)
    steadied = [_steadied(question, total) for question, total in zip(questions, totals, strict=True)]
    return [_placed(total, question) for total, question in zip(steadied, questions, strict=True)]


def _sum(answers: Sequence[Answer], trust: Trust, question: Question) -> Answer:
    plain = {kind.name: kind for kind in question.needs} if question.noise is None else {}
    statistics: dict[str, dict[str, Tensor]] = {}
    for kind in answers[0].statistics:
        values = [answer.statistics[kind] for answer in answers]
        weights = [float(answer.examples) for answer in answers]
        suspects = trust.suspects(len(answers), least=1)
        if trust.sums != "mean" and suspects:
            cuts = shares(values, suspects, question.base)
            if kind in plain:
                cuts = list(map(min, cuts, evened([plain[kind].label_weight(value) for value in values], suspects)))
            weights = [weight * cut for weight, cut in zip(weights, cuts, strict=True)]
        total = sum(weights)
        into = statistics.setdefault(kind, {})
        for value, weight in zip(values, weights, strict=True):
            for name, tensor in value.items():
                part = tensor.double() * (weight / (total or 1))
                into[name] = into[name] + part if name in into else part
    losses = torch.stack([answer.losses for answer in answers]).sum(0)
    judged, examples = sum(answer.judged for answer in answers), sum(answer.examples for answer in answers)
    clients = sum(answer.clients for answer in answers)
    return Answer(losses, judged, examples, statistics, clients, answers[0].noise)


def _judged(totals: list[Answer], good: Sequence[Sequence[Answer]], trust: Trust) -> list[Answer]:
    """The totals with losses that no few clients have decided; of an exchange all points are judged together."""
    voters = [given for given in good if given and given[0].judged]
    suspects = trust.suspects(len(voters), least=int(trust.judgement != "guarded"))
    if trust.judgement == "mean" or not suspects or not any(len(total.losses) for total in totals):
        return totals
    means = torch.stack([torch.cat([answer.loss for answer in given]) for given in voters])
    weights = torch.tensor([given[0].judged for given in voters], dtype=torch.float64)
    found = judged_losses(means, weights, trust.judgement, suspects)
    ends = list(accumulate((len(total.losses) for total in totals), initial=0))
    pieces = [found[first:last] for first, last in pairwise(ends)]
    return [replace(total, losses=piece * total.judged) for total, piece in zip(totals, pieces, strict=True)]


def _steadied(question: Question, total: Answer) -> Answer:
    """Sums with noise as they can be used, going by what is known of the noise."""
    if question.noise is None:
        return total
    kinds = [question.noise.applied(kind) for kind in question.needs]
    statistics = question.noise.steadied(kinds, total.statistics, total.examples, total.clients)
    return replace(total, losses=question.noise.doubted(total.losses, total.clients), statistics=statistics)


def _placed(total: Answer, question: Question) -> Answer:
    """Statistics on the device of the model that they are to improve; clients send them on the CPU."""
    device = next(iter(question.base.values())).device
    placed = {kind: {n: t.to(device) for n, t in value.items()} for kind, value in total.statistics.items()}
    return replace(total, statistics=placed)
