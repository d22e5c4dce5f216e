"""Questions about a merged model: asked by a server, answered by clients with sums, and pooled with care."""

from fedmerge.questions.answering import respond
from fedmerge.questions.pooling import pooled
from fedmerge.questions.question import Answer, Ask, Question, bringing
from fedmerge.questions.trust import Trust

__all__ = ["Answer", "Ask", "Question", "Trust", "bringing", "pooled", "respond"]
