"""Simulated secure aggregation, and what noise costs: no cryptography, and nothing hidden from who runs the server."""
