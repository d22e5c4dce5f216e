"""The one place that touches private parts of Flower, guarded by its version."""

from __future__ import annotations

import traceback
from asyncio import CancelledError
from uuid import uuid4

import flwr
from flwr.app import Context, Error, Message, Metadata, RecordDict

from fedmerge.errors import FedMergeError, InjectedFault
from fedmerge.simulation.workers.causes import in_words

__all__ = [
    "FAILURES",
    "FIRST_NODE",
    "become_server_task",
    "error_reply",
    "failure_reason",
    "from_node",
    "in_reply_to",
    "new_run",
    "rebuild",
    "stamp",
]

_TESTED = ("1.41", "1.42")
_CLIENT_APP_RAISED = 2  # flwr.common.constant.ErrorCode.CLIENT_APP_RAISED_EXCEPTION
_SERVER_NODE = 1
FAILURES = (Exception, SystemExit, GeneratorExit, CancelledError)
"""What a client may raise and have failed: an argument parser that it calls, or a cancelled task, ends nothing else."""
FIRST_NODE = _SERVER_NODE + 1
"""Node of client 0."""


def _private(error: Exception) -> FedMergeError:
    return FedMergeError(
        f"flwr {flwr.__version__} has moved a part that in-process simulation needs ({error}); "
        f"install one that fedmerge is tested with: {', '.join(_TESTED)}"
    )


def become_server_task() -> None:
    """Give this process the identity that Flower's Message wants, unless a Flower task has given it one."""
    try:
        from flwr.supercore.task_identity import TaskIdentity  # noqa: PLC0415 - guarded

        try:
            TaskIdentity.run_id  # noqa: B018 - reading it tells whether it is set
        except RuntimeError:
            TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, _SERVER_NODE
    except (ImportError, AttributeError) as error:
        raise _private(error) from error


def new_run() -> object:
    """An empty run, which a Grid must be able to show."""
    try:
        from flwr.supercore.run import Run  # noqa: PLC0415 - guarded

        return Run.create_empty(run_id=1)
    except (ImportError, AttributeError, TypeError) as error:
        raise _private(error) from error


def stamp(message: Message) -> None:
    """Number a message, as Flower's own in-memory grid does, so that its reply can name it."""
    message.metadata.__dict__["_message_id"] = str(uuid4())


def rebuild(metadata: Metadata, content: RecordDict) -> Message:
    """A message from its two halves, which travel apart so that equal contents travel once."""
    return Message(content=content, metadata=metadata)  # type: ignore[call-overload,no-any-return]


def from_node(message: Message, node: int) -> Message:
    """The same message, shown as coming from another node."""
    message.metadata.__dict__["_src_node_id"] = node
    return message


def in_reply_to(message: Message, reply: Message) -> Message:
    """The same reply, shown as one to this message, whatever it says of itself."""
    reply.metadata.__dict__["_reply_to_message_id"] = message.metadata.message_id
    return from_node(reply, message.metadata.dst_node_id)


def error_reply(message: Message, context: Context, error: BaseException) -> Message:
    """The reply of a client that raised; its reason names client and error, then gives the traceback."""
    client = context.node_config.get("partition-id", f"on node {context.node_id}")
    return Message(Error(code=_CLIENT_APP_RAISED, reason=failure_reason(client, error)), reply_to=message)


def failure_reason(client: object, error: BaseException) -> str:
    """Names client, error and what led to it in a line, then gives the traceback, unless it was made on purpose."""
    if isinstance(error, InjectedFault):
        return f"client {client}: {error}"
    trace = "".join(traceback.format_exception(error)).strip()
    return f"client {client}: {in_words(error)}\n{trace}"
