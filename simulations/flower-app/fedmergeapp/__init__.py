"""A run of fedmerge as a Flower app."""
