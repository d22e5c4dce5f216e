"""Quadratics that clients' curvature makes of their weights, and how to minimise their sum."""
