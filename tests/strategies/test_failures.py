"""Reasons of error replies in one line, whoever wrote them."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
from flwr.app import Error, Message

from fedmerge.errors import ClientFailed
from fedmerge.strategies.failures import failed_client, failures_in, quoted
from fedmerge.strategies.heard import Sent, heard

TRACE = """Traceback (most recent call last):
  File "task.py", line 3, in load
    raise OSError("no disk")
OSError: no disk"""
CHAIN = f"""{TRACE}

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "client.py", line 8, in train
    raise my.errors.Broken("client")
my.errors.Broken: client"""
RAY = """<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=3)
                  ^^^^^^^^^
  File "client_app.py", line 161, in __call__
    return answer(message)
fedmerge.errors.InjectedFault: it crashed in round 1

The above exception was the direct cause of the following exception:

\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=3)
  File "ray_actor.py", line 65, in run
flwr.clientapp.client_app.ClientAppException:
Exception ClientAppException occurred. Message: it crashed in round 1'>"""
REASONS = {
    "ours": (f"client 3: OSError: no disk (from KeyError: 1)\n{TRACE}", 3, "OSError: no disk (from KeyError: 1)"),
    "ours without a partition": ("client on node 9: OSError: no disk\n" + TRACE, "on node 9", "OSError: no disk"),
    "Flower's": ("<class 'ValueError'>:<'two\nlines'>", "on node 9", "ValueError: two lines"),
    "Flower's, of a package": ("<class 'my.errors.Broken'>:<'no'>", "on node 9", "Broken: no"),
    "a traceback": (TRACE, "on node 9", "OSError: no disk"),
    "a chain of them": (CHAIN, "on node 9", "OSError: no disk"),
    "Flower's, out of Ray": (RAY, "on node 9", "InjectedFault: it crashed in round 1"),
    "a word": ("late", "on node 9", "late"),
    "another's": ("client 4: OSError: no disk\n" + TRACE, "on node 9", "it says that it is client 4: OSError: no disk"),
    "another node's": ("client on node 8: late", "on node 9", "it says that it is client on node 8: late"),
    "a huge number": (f"client {'9' * 5000}: late", "on node 9", f"client {'9' * 493}... (500 more characters)"),
    "a cause without an error": ('The above exception was the direct cause File "', "on node 9", 'File "'),
    "nothing": ("", "on node 9", "no reason given"),
    "blank": (" \n ", "on node 9", "no reason given"),
}


def name(node, claimed):
    """Client 3 is on node 9."""
    return (3, True) if (node, claimed) == (9, 3) else (f"on node {node}", False)


@pytest.mark.parametrize("reason", REASONS)
def test_the_cause_is_told_in_a_line(reason):
    given, client, cause = REASONS[reason]
    found = failed_client(9, given, 2, name)
    assert (found.client, found.round, found.reason) == (client, 2, cause)


def test_a_reason_without_end_is_cut():
    assert len(failed_client(9, "x" * 10**6, 1, name).reason) < 600
    assert len(failed_client(9, "client 3: " + "x" * 10**6, 1, name).reason) < 600


def test_only_some_are_quoted():
    failed = [ClientFailed(client, 1, "OSError: no disk") for client in range(30)]
    assert quoted(failed).endswith("client 2 failed: OSError: no disk; and 27 more failed")
    assert quoted(failed[:1]) == "client 0 failed: OSError: no disk"


def reply(node, reason):
    message = Mock(spec=Message)
    message.has_error.return_value, message.error = True, Error(code=1, reason=reason)
    message.metadata.src_node_id = node
    return message


def test_a_node_fails_once_a_round_and_its_first_reason_counts():
    replies = [reply(3, "disk"), reply(2, "late"), reply(3, "disk again")]
    found = failures_in(heard(replies, Sent([2, 3, 4])), 1, name)
    assert [(one.client, one.reason) for one in found] == [
        ("on node 2", "late"),
        ("on node 3", "disk"),
        ("on node 4", "no reply"),
    ]


def test_where_replies_name_no_node_each_failure_counts_and_nobody_is_called_silent():
    replies = [reply(None, "disk"), reply(None, "disk")]
    found = failures_in(heard(replies, Sent([2, 3, 4])), 1, lambda node, claimed: ("unnamed", False))
    assert [one.reason for one in found] == ["disk", "disk"]
