"""How the answers of many clients become one: impossible ones are left out, the others are added up."""

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

Answers = Sequence[tuple[int, Sequence[Answer]]]
"""Each client's number with its answers, one per question."""


def pooled(questions: Sequence[Question], answers: Answers, trust: Trust | None = None) -> list[Answer]:
    """For each question the answers of all clients as one: sums of losses, and means over all examples.

    A client with an impossible answer is left out with a warning. The numbers of the others are believed, unless
    `trust` says otherwise.

    Raises
    ------
    NoAnswer
        No client's answers can be used.
    """
    trust = trust or Trust("mean", "mean")
    return added_up(questions, sifted(questions, answers, trust)[0], trust)


def sifted(
    questions: Sequence[Question],
    answers: Answers,
    trust: Trust,
    claims: Mapping[int, float] | None = None,
    asked: Collection[int] | None = None,
) -> tuple[list[list[Answer]], dict[int, str]]:
    """The clients' answers that can be used, and by client the reasons why the other clients' cannot.

    Parameters
    ----------
    questions, answers
        What was asked, and what came, by client.
    trust
        The least loss that is possible, and how many clients may lie.
    claims
        How many examples each client said in training that it has: it may answer for no more. If most clients answer
        for more, the numbers meant something else, and they are ignored.
    asked
        The clients that were asked, where that is known. Answers of others are ignored.
    """
    lowest = trust.lowest_loss or 0.0
    answers = [(client, sent) for client, sent in answers if asked is None or client in asked]
    times, limits = Counter(client for client, _ in answers), _plausible(claims or {}, answers)
    # A single answer may be the sum of several clients' answers, as masks make it. One answer among many may not.
    is_sum = len(answers) == 1
    refused, good = {client: f"it answered {n} times" for client, n in times.items() if n > 1}, []
    for client, sent in answers:
        if client in refused:
            continue
        try:
            decoded = checked(questions, sent, limits.get(client), lowest)
            if not is_sum and any(answer.clients != 1 for answer in decoded):
                raise InvalidOption("an answer in the name of several clients")
            good.append((client, decoded))
        except InvalidOption as error:
            refused[client] = str(error)
    forms = Counter(_names_and_shapes(decoded) for _, decoded in good)
    for client, decoded in good:
        if _names_and_shapes(decoded) != forms.most_common(1)[0][0]:
            refused[client] = "tensors with other names or shapes than most clients'"
    if not is_sum:
        remaining = [(client, decoded) for client, decoded in good if client not in refused]
        refused |= _unlawful(questions, remaining, trust.suspects(len(remaining), least=1))
    for client, reason in sorted(refused.items()):
        log.warning("client %d: its answer is left out: %s", client, reason[:500])
    return [decoded for client, decoded in good if client not in refused], refused


def _unlawful(questions: Sequence[Question], good: Answers, liars: int) -> dict[int, str]:
    """Clients whose sums break an identity that all others keep, up to as many as may lie; each with the reason."""
    reasons: dict[int, str] = {}
    for number, question in enumerate(questions):
        # Noise breaks identities.
        for kind in question.needs if question.noise is None else ():
            values = [sent[number].statistics[kind.name] for _, sent in good]
            for place, broken in breaches([kind.identities(value) for value in values], liars).items():
                reason = f"statistic {kind.name!r}: all others' numbers keep an identity that its own break: {broken}"
                reasons.setdefault(good[place][0], reason)
    return reasons


def _names_and_shapes(answers: Sequence[Answer]) -> tuple[object, ...]:
    return tuple(
        (kind, name, tuple(tensor.shape))
        for answer in answers
        for kind, value in sorted(answer.statistics.items())
        for name, tensor in sorted(value.items())
    )


def _plausible(claims: Mapping[int, float], answers: Answers) -> Mapping[int, float]:
    """The claimed numbers of examples if most clients answer for no more than they claimed; else none."""
    pairs = [(claims[c], sent[0].judged + sent[0].examples) for c, sent in answers if c in claims and sent]
    more = sum(answered > claimed for claimed, answered in pairs)
    return claims if 2 * more <= len(pairs) else {}


def added_up(questions: Sequence[Question], good: Sequence[Sequence[Answer]], trust: Trust) -> list[Answer]:
    """For each question the answers of all clients as one.

    Parameters
    ----------
    questions
        What was asked.
    good
        Each client's answers, as :func:`sifted` returns them.
    trust
        How far single clients are believed.

    Raises
    ------
    NoAnswer
        There are no answers.
    """
    if not good:
        raise NoAnswer("no client answered a question about the merged model with anything that can be used")
    totals = [_sum([sent[i] for sent in good], trust, question) for i, question in enumerate(questions)]
    totals = _with_robust_losses(totals, good, trust)
    totals = [_denoised(question, total) for question, total in zip(questions, totals, strict=True)]
    return [_on_models_device(total, question) for total, question in zip(totals, questions, strict=True)]


def _sum(answers: Sequence[Answer], trust: Trust, question: Question) -> Answer:
    """All clients' answers to one question: losses added, statistics averaged by numbers of examples."""
    plain = {kind.name: kind for kind in question.needs} if question.noise is None else {}
    statistics: dict[str, dict[str, Tensor]] = {}
    for kind in answers[0].statistics:
        values = [answer.statistics[kind] for answer in answers]
        weights = [float(answer.examples) for answer in answers]
        suspects = trust.suspects(len(answers), least=1)
        if trust.sums != "mean" and suspects:
            cuts = shares(values, suspects, question.base)
            if kind in plain:
                by_label = evened([plain[kind].label_weight(value) for value in values], suspects)
                cuts = list(map(min, cuts, by_label))
            weights = [weight * cut for weight, cut in zip(weights, cuts, strict=True)]
        total = sum(weights)
        mean = statistics.setdefault(kind, {})
        for value, weight in zip(values, weights, strict=True):
            for name, tensor in value.items():
                part = tensor.double() * (weight / (total or 1))
                mean[name] = mean[name] + part if name in mean else part
    losses = torch.stack([answer.losses for answer in answers]).sum(0)
    judged, examples = sum(answer.judged for answer in answers), sum(answer.examples for answer in answers)
    clients = sum(answer.clients for answer in answers)
    return Answer(losses, judged, examples, statistics, clients, answers[0].noise)


def _with_robust_losses(totals: list[Answer], good: Sequence[Sequence[Answer]], trust: Trust) -> list[Answer]:
    """The totals, with losses in which a few clients cannot decide which point is best.

    The points of all questions of an exchange are judged together, for the best of all of them is chosen.
    """
    voters = [sent for sent in good if sent and sent[0].judged]
    suspects = trust.suspects(len(voters), least=int(trust.judgement != "guarded"))
    if trust.judgement == "mean" or not suspects or not any(len(total.losses) for total in totals):
        return totals
    means = torch.stack([torch.cat([answer.loss for answer in sent]) for sent in voters])
    weights = torch.tensor([sent[0].judged for sent in voters], dtype=torch.float64)
    robust = judged_losses(means, weights, trust.judgement, suspects)
    ends = list(accumulate((len(total.losses) for total in totals), initial=0))
    pieces = [robust[first:last] for first, last in pairwise(ends)]
    return [replace(total, losses=piece * total.judged) for total, piece in zip(totals, pieces, strict=True)]


def _denoised(question: Question, total: Answer) -> Answer:
    """The total with noisy sums brought into a form that can be used, by what is known of the noise."""
    if question.noise is None:
        return total
    kinds = [question.noise.applied(kind) for kind in question.needs]
    statistics = question.noise.steadied(kinds, total.statistics, total.examples, total.clients)
    return replace(total, losses=question.noise.doubted(total.losses, total.clients), statistics=statistics)


def _on_models_device(total: Answer, question: Question) -> Answer:
    """The total with its statistics on the model's device: clients send them on the CPU."""
    device = next(iter(question.base.values())).device
    moved = {kind: {n: t.to(device) for n, t in value.items()} for kind, value in total.statistics.items()}
    return replace(total, statistics=moved)
