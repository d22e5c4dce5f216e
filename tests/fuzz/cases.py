"""Streams of damaged replies and messages, each case with a name."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedmerge.simulation.grids.simulation_grid import SimulationGrid
from fedmerge.simulation.workers.flower_task import become_server_task, stamp
from tests.answered import Asked, answer, asked, odd_app, odd_arrays
from tests.fuzz import mutate

Case = tuple[str, Callable[[], object]]


@cache
def _of_five(method: str) -> Asked:
    return Asked(method, 5)


def replies(seed: int, methods: tuple[str, ...], number: int) -> Iterator[Case]:
    """Rounds with three good replies and two that are good or damaged, and may say to be another's: they have to end
    with a model."""
    rng = random.Random(seed)
    for i in range(number):
        method = methods[i % len(methods)]
        known = _of_five(method)
        bad = rng.sample(range(5), rng.randint(1, 2))
        sent = known.replies([mutate.reply(rng, c) if k in bad else c for k, c in enumerate(known.contents)])
        if rng.random() < 0.2:
            sent += [answer(rng.choice([2 + bad[0], 99, 0]), mutate.reply(rng, rng.choice(known.contents)))]
        rng.shuffle(sent)
        yield f"reply {seed}/{i} {method}", lambda known=known, sent=sent: _merged(known, sent)


def _merged(known: Asked, sent: list[Message]) -> None:
    known.strategy.memory = {}
    arrays, _ = known.strategy.aggregate_train(1, iter(sent))
    assert list(arrays) == list(known.arrays)


def evaluations(seed: int, number: int) -> Iterator[Case]:
    """Answers to an evaluation."""
    rng, known = random.Random(seed), asked("fedavg")
    for i in range(number):
        contents = [RecordDict({"metrics": one["metrics"]}) for one in known.contents]
        contents += [mutate.reply(rng, contents[0]) for _ in range(2)]
        sent = known.replies(contents)
        yield f"evaluation {seed}/{i}", lambda sent=sent: known.strategy.aggregate_evaluate(1, sent)


class Between:
    """A grid that damages some of what clients answer within a merge, and of their names."""

    def __init__(self, inner: SimulationGrid, rng: random.Random) -> None:
        self.inner, self.rng = inner, rng

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def send_and_receive(self, messages, **keywords):
        """Replies, some damaged."""
        found = []
        for message in self.inner.send_and_receive(list(messages), **keywords):
            if message.has_content() and self.rng.random() < 0.4:
                content = mutate.reply(self.rng, message.content)
                message.content = content
            found.append(message)
        return found


def stages(seed: int, number: int) -> Iterator[Case]:
    """Rounds of FedMA, and of batch norms measured anew, whose later exchanges bring damaged replies."""
    from tests.answered import strategy_of

    rng = random.Random(seed)
    for i in range(number):
        draws = random.Random(rng.random())

        def case(method=("fedma", "fedavg")[i % 4 > 0], child=draws):
            become_server_task()
            norms = "mean" if method == "fedma" else "recalibrate"
            strategy = strategy_of(method, fraction_evaluate=0.0, batch_norm=norms)
            with SimulationGrid(odd_app(), 3) as inner:
                grid = Between(inner, child)
                messages = list(strategy.configure_train(1, odd_arrays(), ConfigRecord(), grid))
                strategy.aggregate_train(1, inner.send_and_receive(messages))

        yield f"stage {seed}/{i}", case


def client_messages(seed: int, number: int) -> Iterator[Case]:
    """Messages with garbage to a client."""
    rng, app = random.Random(seed), odd_app()
    good = {"server-round": 1, "epochs": 1, "seed": 3, "needs": ["fisher_diag"], "learning-rate": 0.1, "stage": 0}
    garbage = (0, -1, 2.5, "x", b"\0", [], ["gram"], [1], ["../x"], True, float("nan"), 2**62)
    keys = [*good, "needs-settings", "statistics-compression", "statistics-budget", "frozen", "send", "batch-norm"]
    keys += ["momentum", "batch-size", "optimizer", "proximal-mu", "clip-norm", "weight-decay", "keep-model"]
    written = ('{"examples": 1e99}', '{"layers": 3}', "[" * 5000, '{"loss": "x"}', "null", "[]", '{"samples": -1}')
    for i in range(number):
        become_server_task()
        config = dict(good)
        for _ in range(rng.randint(0, 3)):
            key = rng.choice(keys)
            # How long a client works is the server's to say: a huge number is no fault.
            config[key] = rng.choice(garbage[:-1] if key in ("epochs", "steps") else garbage)
        if rng.random() < 0.2:
            config |= {"needs": [rng.choice(("gram", "activations", "x"))], "needs-settings": [rng.choice(written)]}
        content = RecordDict({"arrays": odd_arrays(), "config": ConfigRecord(config)})
        if rng.random() < 0.5:
            content = mutate.reply(rng, content)
        message = Message(content, dst_node_id=2, message_type=rng.choice(("train", "evaluate", "query.statistics")))
        stamp(message)
        state = RecordDict({"fedmerge.model": odd_arrays()} if rng.random() < 0.5 else {})
        context = Context(1, 2, {"partition-id": 0, "num-partitions": 3}, state, {})
        yield f"client {seed}/{i}", lambda m=message, c=context: app(m, c)
