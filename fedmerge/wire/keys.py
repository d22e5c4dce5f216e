"""Names of entries and records in messages, which the server and the client side both know."""

from __future__ import annotations

__all__ = [
    "ACTION",
    "COMPLETES_KEY",
    "ERROR_KEY",
    "FINGERPRINT_KEY",
    "KEEP_KEY",
    "MISSED_KEY",
    "MODE_KEY",
    "NAMES_KEY",
    "OWN",
    "PERSONAL_KEY",
    "ROUTING",
    "SOURCES",
]


ERROR_KEY = "statistics-error"
"""Metric of a reply: the largest relative error that compression made."""


KEEP_KEY = "keep-model"
"""Entry of a message's ConfigRecord: the client keeps its model in its Context until the next message."""


MISSED_KEY = "missed-replies"
"""Entry of a message's ConfigRecord: nodes whose last reply was not merged, each as ``node:round`` with the first round
of which that is so."""


SOURCES = "sources"
"""Record of a stage's message: how neurons were re-ordered."""


PERSONAL_KEY = "personal"
"""Entry of a message's ConfigRecord: patterns of what clients keep to themselves."""


FINGERPRINT_KEY, NAMES_KEY = "frozen-fingerprint", "frozen-names"
"""Entries by which a client finds out whether its frozen tensors are the server's, and that it is not to send them."""


MODE_KEY = "frozen-mode"


COMPLETES_KEY = "completes-models"
"""Entry of a reply: the client makes or keeps what of the model does not travel."""


LINEARISED_KEY = "linearised"
"""Entry of a message's ConfigRecord: patterns of parameters in which the model that it brings is linearised."""


ACTION = "questions"
"""Of the query messages."""


OWN = "own"
"""Record of a question: the client's own model, where its neurons were moved."""

ROUTING = "routing"
"""Record of an evaluate message: experts and gates, of which a client makes a routed model of the model sent."""
