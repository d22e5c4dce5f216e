"""The commands of the terminal, a module each; what they show stands in ``tables`` and ``progress``.

A command imports what it uses when it runs, so that ``--help`` waits for nothing.
"""
