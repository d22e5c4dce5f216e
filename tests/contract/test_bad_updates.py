"""Laws of bad input: what cannot be merged is named, and does no harm."""

from __future__ import annotations

import pytest
from torch import nn

import fedmerge
from fedmerge import BadUpdate, ClientUpdate, NoUsableUpdates
from fedmerge.merging import Pipeline, intake
from tests.contract.laws import BAD_WEIGHTS, FAULTS, base, law, merged, modules, same, spoilt, updates
from tests.contract.table import ROWS

TWO = [row for row in ROWS if not row.options and row.method in ("fedavg", "rebasin")]
"""One that adds updates up as they come, and one that collects them and knows the model: see the first test."""
BOTH = pytest.mark.parametrize("row", TWO, ids=str)


@law("bad updates")
def test_every_method_gets_its_updates_through_the_same_check(row, monkeypatch, caplog):
    """What that check does is then tested with two methods alone."""
    checked, plain = [], intake.checked_update
    monkeypatch.setattr(
        intake, "checked_update", lambda sent, *a, **k: checked.append(sent.client) or plain(sent, *a, **k)
    )
    good = updates(row)
    bad = [good[0], spoilt(good[1], "nan"), good[2]]
    result = merged(row, bad)
    assert type(row.pipeline()) is Pipeline
    assert checked == [0, 1, 2]
    without = merged(row, [good[0], good[2]])
    assert same(result.state, without.state)
    assert same(result.memory, without.memory)
    assert result.accepted == (0, 2)
    assert [dropped.client for dropped in result.dropped] == [1]
    assert "client 1" in caplog.text


@BOTH
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_update_is_dropped_and_listed_or_raised(row, fault, caplog):
    good = updates(row)
    bad = [good[0], spoilt(good[1], fault), good[2]]
    result, without = merged(row, bad), merged(row, [good[0], good[2]])
    assert same(result.state, without.state)
    assert same(result.memory, without.memory)
    assert result.accepted == (0, 2)
    (dropped,) = result.dropped
    assert dropped.client == 1
    assert FAULTS[fault] in dropped.reason
    assert "client 1" in caplog.text
    with pytest.raises(BadUpdate, match="client 1") as caught:
        merged(row, bad, on_bad_update="raise")
    assert FAULTS[fault] in str(caught.value)


@law("bad first")
def test_a_bad_first_update_does_no_harm(row):
    """Nor does one of another form than the model: what methods make of a first update is never made of it."""
    sent = updates(row)
    result = merged(row, [spoilt(sent[0], "missing"), *sent[1:]])
    assert same(result.state, merged(row, sent[1:]).state)
    assert [dropped.client for dropped in result.dropped] == [0]


@BOTH
def test_nor_does_a_bad_last_one(row):
    sent = updates(row)
    assert same(merged(row, [*sent[:2], spoilt(sent[2], "nan")]).state, merged(row, sent[:2]).state)


@BOTH
@pytest.mark.parametrize("fault", ["nan", "missing", "unknown", "shape", *BAD_WEIGHTS])
def test_a_bad_model_at_hand_is_an_error_that_names_it(row, fault):
    place, (models, keywords) = 1, modules(row)
    bad = models[place]
    if fault == "nan":
        bad[0].weight.data[0, 0] = float("nan")
    elif fault == "missing":
        bad[3] = nn.Linear(6, 3, bias=False)
    elif fault == "unknown":
        bad.append(nn.Linear(1, 1))
    elif fault == "shape":
        bad[0] = nn.Linear(5, 6)
    else:
        keywords["weights"][place] = BAD_WEIGHTS[fault]
    tensor = {"nan": "0.weight", "missing": "3.bias", "unknown": "4.weight", "shape": "0.weight"}
    with pytest.raises(BadUpdate) as caught:
        fedmerge.merge(models, row.method, **keywords)
    assert caught.value.client == place
    assert f"client {place}" in str(caught.value)
    assert tensor.get(fault, "number of examples") in caught.value.reason


@BOTH
def test_nothing_usable_is_an_error_that_says_why(row):
    bad = [spoilt(update, "nan") for update in updates(row)]
    with pytest.raises(NoUsableUpdates, match=r"0 usable updates.*0\.weight.*NaN"):
        merged(row, bad)
    with pytest.raises(NoUsableUpdates, match="at least 3 wanted"):
        merged(row, [*updates(row)[:2], bad[2]], min_updates=3)
    with pytest.raises(NoUsableUpdates):
        merged(row, [])


@law("missing statistics")
def test_missing_statistics_are_named(row):
    needs = row.pipeline().needs
    if not needs:
        assert not row.statistics(0, base())
        return
    bare = [ClientUpdate(u.client, u.state, u.weight) for u in updates(row)]
    with pytest.raises(NoUsableUpdates, match=f"statistic '{needs[0]}' is missing"):
        merged(row, bare)
