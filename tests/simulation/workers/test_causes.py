"""Causes of failures in words."""

from __future__ import annotations

from fedmerge.errors import ModelError
from fedmerge.simulation.workers.causes import in_words


def raised(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("it raised nothing")


def test_the_innermost_cause_is_told_whether_it_was_chained_or_only_handled():
    def chained():
        try:
            raise OSError("the disk\n  is gone")
        except OSError as error:
            raise RuntimeError("no data") from error

    def handled():
        try:
            chained()
        except RuntimeError:
            raise ValueError("no client")  # noqa: B904 - as people write it

    assert in_words(raised(chained)) == "RuntimeError: no data (from OSError: the disk is gone)"
    assert in_words(raised(handled)) == "ValueError: no client (from OSError: the disk is gone)"


def test_what_is_quoted_already_or_denied_is_not_told_twice():
    def quoting():
        try:
            raise KeyError("conv.weight")
        except KeyError as error:
            raise ModelError(f"not this model: {error}") from error

    def denied():
        try:
            raise KeyError("conv.weight")
        except KeyError:
            raise ModelError("not this model") from None

    assert in_words(raised(quoting)) == "ModelError: not this model: 'conv.weight'"
    assert in_words(raised(denied)) == "ModelError: not this model"


def test_a_bare_assertion_is_told_by_its_place():
    def bare():
        raise AssertionError

    told = in_words(raised(bare))
    assert told.startswith("AssertionError in test_causes.py, line ")
    assert told.endswith("raise AssertionError")


def test_errors_that_carry_another_out_of_a_worker_are_looked_into():
    class System(Exception):
        client_exc: Exception

    class Task(Exception):
        cause: Exception

    system, task = System("pages of text"), Task("more of it")
    system.client_exc, task.cause = ModuleNotFoundError("No module named 'task'"), system
    assert in_words(task) == "ModuleNotFoundError: No module named 'task'"
    task.cause = task  # as nobody should
    assert in_words(task) == "Task: more of it"


def test_an_error_that_cannot_be_read_or_never_ends_is_still_a_line():
    class Silent(Exception):
        def __str__(self):
            raise RuntimeError("no")

    assert in_words(Silent()) == "Silent: its message cannot be made"
    assert len(in_words(ValueError("x" * 10_000))) < 600
