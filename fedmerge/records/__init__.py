"""Files of a run: written whole or not at all, locked, digested, and never pickled."""
