"""Flower grids of virtual clients, and grids around them that lose, police or count what goes over."""
