"""Imported before all else, it makes the imports that follow faster.

As objects become more, Python goes through all of them again and again, to find those that only hold each other:
garbage. Imports create some hundred thousand objects that stay. Without looking for garbage among them, the imports of
train.py took 0.7 of the time (benchmarks/README.md).
"""

import gc

gc.disable()


def end() -> None:
    """After the imports, let Python look for garbage again, but not among what was imported.

    That stays in any case, and Python writes to what it looks at: each process that loads photographs would then have
    a copy of what it shares with the one that trains.
    """
    gc.freeze()
    gc.enable()
