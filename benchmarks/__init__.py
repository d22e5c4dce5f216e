"""Measurements of speed and memory; README.md beside this file says which is which."""
