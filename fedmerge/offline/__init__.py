"""Merging and measuring models that are at hand, in memory or in files, without a federation."""
