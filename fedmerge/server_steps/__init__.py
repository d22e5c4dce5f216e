"""Server steps: what the server does with a merged model before it becomes the next global model. One file each."""

from fedmerge.server_steps.adaptive import ServerAdagrad, ServerAdam, ServerYogi
from fedmerge.server_steps.momentum import ServerMomentum
from fedmerge.server_steps.server_step import ServerStep

__all__ = ["ServerAdagrad", "ServerAdam", "ServerMomentum", "ServerStep", "ServerYogi"]
