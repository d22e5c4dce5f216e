"""The client side: a Flower ClientApp, and the road of a client through one order.

:mod:`~fedmerge.clients.road` holds the stages that every client goes through, each written once::

    receive ─► enter ─► add_own ─► train ─► attack ─► keep ─► measure ─► fault ─► encode

Three drivers run them: :class:`~fedmerge.clients.answers.Answers` for a Flower message, and
:mod:`fedmerge.simulation.workers.cohort_work` for clients of a cohort, one by one or stacked. A stage is a function
``stage(client, group) -> group``: `client` is what all clients of a process share
(:class:`~fedmerge.clients.client.Client`), `group` those who go together
(:class:`~fedmerge.clients.group.Group`), one of them or many whose models are stacked. It changes nothing but the
module on loan and what its clients keep.

Where things go that clients are to do besides:

- **Tensors that do not travel** (frozen, personal) are told by ``group.order.parts``
  (:class:`~fedmerge.clients.own_parts.OwnParts`): ``add_own`` puts them into the state that it fits, ``keep`` leaves
  personal ones in ``group.kept[row]``, ``measure`` measures nothing of them, and ``encode`` leaves both out. Of a
  group that trains stacked, ``group.own[row]`` holds the tensors that this client starts from in the module's place.
- **Local rules** with a state (control variates): what comes with the order is in ``group.order.brought[name]``, what
  the client kept in ``group.kept[row][name]`` (Flower records, so that they are checkpointed and survive in a
  deployment), and what it sends back goes to ``group.returned[row][name]`` in ``train``; it travels as a record
  ``statistics.<name>`` and arrives as ``update.statistics[name]``. For an order whose clients keep something,
  :attr:`fedmerge.strategies.order.Order.keeps` has to say so.
- **Tasks**: ``client.task`` is handed on by ``train`` and ``measure``.
- **A user's own data**: ``enter`` gets ``group.data[row]``; ``train`` and ``measure`` are the ones who read examples.
- **What the server tells clients**: an entry of the order's configuration, read once by
  :class:`~fedmerge.clients.group.Instructions`, whose list of known entries has to name it.
"""

from fedmerge.clients.app import client_app
from fedmerge.clients.measure import add_statistics

__all__ = ["add_statistics", "client_app"]
