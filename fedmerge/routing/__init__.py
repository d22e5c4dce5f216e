"""Routed models: a shared model, experts that add to its parameters, and gates that weigh them by the input."""

from fedmerge.routing.gate import Gate
from fedmerge.routing.routed_model import RoutedModel
from fedmerge.routing.routing import Routing

__all__ = ["Gate", "RoutedModel", "Routing"]
