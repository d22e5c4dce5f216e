"""How statistics travel, and what has to be so of those that arrive."""
