"""Examples in any form give the same batches, and what does not fit into memory is never held."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from fedmerge.data import ClientData
from fedmerge.data.client_data import client_data, examples_of
from fedmerge.data.streamed_examples import ChangedExamples
from fedmerge.errors import CannotStack, DataError
from fedmerge.simulation.scenarios.attacks import Backdoor, LabelFlip
from fedmerge.training import LocalTraining, Participant, evaluate, judge, train, train_cohort, train_one_by_one
from fedmerge.training.local import batches_to_measure

RNG = torch.Generator().manual_seed(3)
X = torch.randn(13, 4, generator=RNG)
Y = torch.arange(13) % 3
SETTINGS = LocalTraining(epochs=2, batch_size=4)


class Rows(torch.utils.data.Dataset):
    """Reads a row when asked for it, and counts how many are alive at once."""

    def __init__(self, size=13):
        self.size, self.read = size, []

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        self.read.append(i)
        return X[i % 13], int(Y[i % 13])


class Hub:
    """Behaves like a table of Hugging Face's: rows are mappings, several come as a list."""

    def __len__(self):
        return 13

    def __getitem__(self, i):
        return {"pixels": X[i].numpy(), "label": int(Y[i])}

    def __getitems__(self, rows):
        return [self[i] for i in rows]


def drawn(batch_size, generator):
    order = np.arange(13) if generator is None else generator.permutation(13)
    for start in range(0, 13, batch_size):
        rows = torch.from_numpy(order[start : start + batch_size])
        yield X[rows], Y[rows]


def paired(examples):
    return torch.stack([x for x, _ in examples]), torch.tensor([int(y) for _, y in examples])


FORMS = {
    "tensors": lambda: ClientData(X, Y),
    "arrays": lambda: ClientData(X.numpy(), Y.numpy().astype(np.uint8)),
    "TensorDataset": lambda: ClientData(TensorDataset(X, Y), TensorDataset(X[:0], Y[:0])),
    "own data set": lambda: ClientData(train=Rows()),
    "list of pairs": lambda: ClientData([(x, y) for x, y in zip(X, Y, strict=True)]),
    "float64 arrays": lambda: ClientData([(x.double().numpy(), int(y)) for x, y in zip(X, Y, strict=True)]),
    "subset": lambda: ClientData(Subset(TensorDataset(X, Y), range(13))),
    "hub": lambda: ClientData(Hub()),
    "collate_fn": lambda: ClientData(TensorDataset(X, Y), collate_fn=paired),
    "function": lambda: ClientData(drawn),
}


def trained(data, task=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3))
    report = train(net, data.train, None, SETTINGS, seed=1, client=2, round=3, task=task)
    return net, report


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_and_judges_to_the_same_bits(form):
    (net, report), (want, expected) = trained(FORMS[form]()), trained(ClientData(X, Y))
    assert report == expected
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), want.parameters(), strict=True))
    assert evaluate(net, FORMS[form]().train) == evaluate(net, X, Y)
    assert len(FORMS[form]()) == 13
    assert not len(FORMS[form]().held_out)


def halves(rows):
    x, y = paired(rows)
    return [x[:, :1], x[:, 1:]], y


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 3)

    def forward(self, left, right):
        return self.head(torch.cat((left, right), 1))


NESTS = {
    "tuple": lambda: ClientData((X[:, :1], X[:, 1:]), Y),
    "mapping": lambda: ClientData({"right": X[:, 1:], "left": X[:, :1]}, Y),
    "three of a row": lambda: ClientData(TensorDataset(X[:, :1], X[:, 1:], Y)),
    "mappings": lambda: ClientData([{"left": x[:1], "right": x[1:], "y": y} for x, y in zip(X, Y, strict=True)]),
    "collate_fn": lambda: ClientData(TensorDataset(X, Y), collate_fn=halves),
}


@pytest.mark.parametrize("form", NESTS)
def test_inputs_may_be_several_tensors(form):
    data = NESTS[form]()
    net = Two()
    train(net, data.train, None, SETTINGS, seed=1, client=2, round=3)
    plain = nn.Linear(4, 3)
    plain.load_state_dict(Two().head.state_dict())
    train(plain, X, Y, SETTINGS, seed=1, client=2, round=3)
    assert torch.equal(net.head.weight, plain.weight)
    assert judge(net, data.train) == judge(plain, X, Y)


def test_a_data_set_is_read_batch_by_batch_and_never_held():
    rows = Rows(10**5)
    net = nn.Linear(4, 3)
    train(net, rows, None, LocalTraining(steps=2, batch_size=4), seed=0, client=0, round=1)
    assert len(rows.read) == 8
    assert len(set(rows.read)) == 8


def test_measuring_reads_anew_each_time_and_holds_one_batch_at_a_time():
    rows = Rows(1030)
    batches = batches_to_measure(examples_of(rows))
    first = iter(batches)
    next(first)
    assert len(rows.read) == 512
    assert sum(len(y) for _, y in batches) == sum(len(y) for _, y in batches) == 1030


def test_tensors_are_measured_without_a_copy():
    (inputs, labels), *rest = batches_to_measure(examples_of(X, Y))
    assert not rest
    assert inputs.data_ptr() == X.data_ptr()
    assert labels.data_ptr() == Y.data_ptr()


def test_steps_of_a_function_go_on_over_its_passes():
    seen = []

    class Counted:
        def __len__(self):
            return 13

        def __call__(self, batch_size, generator):
            for batch in drawn(batch_size, generator):
                seen.append(batch[1])
                yield batch

    train(nn.Linear(4, 3), Counted(), None, LocalTraining(steps=6, batch_size=4), seed=0, client=0, round=1)
    assert [len(y) for y in seen] == [4, 4, 4, 1, 4, 4]


def test_who_reads_batch_by_batch_trains_one_by_one():
    people = [Participant(0, X, Y), Participant(1, Rows()), Participant(2, (X, X), Y)]
    with pytest.raises(CannotStack, match="client 1 are read batch by batch"):
        train_cohort(nn.Linear(4, 3), people[:2], SETTINGS, seed=0, round=1)
    with pytest.raises(CannotStack, match="client 2 are several tensors"):
        train_cohort(nn.Linear(4, 3), people[::2], SETTINGS, seed=0, round=1)
    done = train_one_by_one(nn.Linear(4, 3), [Participant(1, X, Y), people[1]], SETTINGS, seed=0, round=1)
    assert torch.equal(done.states["weight"][0], done.states["weight"][1])


class Pair(NamedTuple):
    x: torch.Tensor
    y: int


def broken(batch_size, generator):
    yield X[:2], Y[:2]
    raise OSError("disk")


class Unread(Rows):
    def __getitem__(self, i):
        if i == 7:
            raise OSError("file 7 is gone")
        return super().__getitem__(i)


def with_hole(value):
    x = X.clone()
    x[5, 1] = value
    return x


class NoLength:
    def __getitem__(self, i):
        return X[0], 0


class Stream(IterableDataset):
    def __iter__(self):
        yield X[0], 0


UNUSABLE = {
    "nan": (TensorDataset(with_hole(torch.nan), Y), "inputs hold NaN, in 1 of 13 examples, first in example 5"),
    "inf": (TensorDataset(with_hole(torch.inf), Y), "infinite values"),
    "nan in one of several": (TensorDataset(X, with_hole(torch.nan), Y), "NaN"),
    "nan targets": (TensorDataset(X, with_hole(torch.nan)), "labels hold NaN"),
    "unread": (Unread(), "example 7 cannot be read: OSError: file 7 is gone"),
    "shapes": ([(torch.zeros(1 + i % 2), 0) for i in range(13)], "the default collation makes no batch.*same shape"),
    "texts": ([("a", 0)] * 13, "pass a tensor|without any tensor"),
    "no target": ([X[0]] * 13, "a batch is a Tensor.*pairs"),
    "mapping without": ([{"x": X[0]}] * 13, "mapping with 'x', of which none names a target: use one of label"),
    "two targets": ([{"x": X[0], "y": 0, "label": 1}] * 13, "'label' and 'y' names a target"),
    "function": (broken, r"function of batches fails \(OSError: disk\)"),
    "no batches": (lambda batch_size, generator: iter(()), "no examples|gave none"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_turns_out_unusable_when_read_is_told_with_the_client(kind):
    given, words = UNUSABLE[kind]
    data = client_data(lambda *_: ClientData(train=given), 7, 9)
    with pytest.raises(Exception, match=words) as told:
        train(nn.Linear(4, 3), data.train, None, LocalTraining(batch_size=13), seed=0, client=7, round=1)
    assert "client 7" in str(told.value)


REFUSED = {
    "iterable": (Stream(), "IterableDataset, whose examples come in one order"),
    "loader": (DataLoader(Rows()), "pass loader.dataset, and collate_fn=loader.collate_fn"),
    "no length": (NoLength(), "number of examples of a NoLength cannot be had"),
    "text": ("data.csv", "labels are a NoneType|are a str"),
    "number": (3, "got 3: pass tensors, a map-style data set"),
    "mapping": ({"x": X}, "labels are a NoneType"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_gives_no_batches_is_refused_at_once(kind):
    given, words = REFUSED[kind]
    with pytest.raises(DataError, match=words):
        ClientData(given)


@pytest.mark.parametrize(
    "given",
    [
        {"train": Rows(), "train_x": X, "train_y": Y},
        {"train": Rows(), "held_out": Rows(), "held_out_x": X, "held_out_y": Y},
    ],
)
def test_examples_given_twice_are_refused(given):
    with pytest.raises(DataError, match="given twice"):
        ClientData(**given)


def test_a_collation_for_what_needs_none_is_refused():
    for given in ((X, Y), drawn):
        with pytest.raises(DataError, match="collate_fn is for data sets"):
            examples_of(given, collate_fn=paired)


def test_labels_of_a_stream_are_checked_in_every_batch():
    labels = Y.clone()
    labels[12] = 9
    for part in (train, judge):
        extra = {"settings": SETTINGS, "seed": 0, "client": 4, "round": 1} if part is train else {"what": "client 4"}
        with pytest.raises(Exception, match="client 4: labels 9 are not among the model's 3 classes"):
            part(nn.Linear(4, 3), TensorDataset(X, labels), None, **extra)


def test_tensors_are_not_to_be_had_of_what_is_read_batch_by_batch():
    with pytest.raises(DataError, match=r"use ClientData\.train, whose in_order"):
        _ = ClientData(Rows()).train_x


def test_attacks_poison_what_is_read_batch_by_batch_as_they_poison_tensors():
    images = X[:, :, None].repeat(1, 1, 4)[:, None]
    for attack in (LabelFlip(), Backdoor(target=1)):
        memory, stream = ClientData(images, Y), ClientData(TensorDataset(images, Y))
        poisoned = [attack.poisoned(data, 3, np.random.default_rng(0)).train for data in (memory, stream)]
        rows = np.array([12, 0, 5])
        (x, y), (other_x, other_y) = (one.take(rows) for one in poisoned)
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
        assert not torch.equal(y, Y[rows])
        assert isinstance(poisoned[1], ChangedExamples)
