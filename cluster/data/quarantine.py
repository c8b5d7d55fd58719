"""Items of damaged bytes, or of a loss or gradient that is not finite: they keep their positions, and count nothing from there on.

A run may ask for that (`data.on_corrupt=quarantine`); else it ends at the first of them. Every rank has the same list, and every
checkpoint carries it, so an item once in it stays out of the run, even if its bytes are repaired later.
"""

from collections.abc import Iterable
from typing import NamedTuple


class BadItem(NamedTuple):
    """An item that counts nothing at this position of the order and after it, and why."""

    item: int
    position: int
    why: str


class Quarantine:
    """The list; safe to read from the reader threads while the loop adds to it."""

    def __init__(self, entries: Iterable[BadItem] = ()):
        self._bad: dict[int, BadItem] = {}
        self.add(entries)

    def __len__(self) -> int:
        return len(self._bad)

    @property
    def entries(self) -> list[BadItem]:
        """The list in the order of items, for a checkpoint."""
        return sorted(self._bad.values())

    def holds(self, item: int, position: int) -> bool:
        """Whether the item counts nothing at this position."""
        return (bad := self._bad.get(item)) is not None and position >= bad.position

    def add(self, entries: Iterable[BadItem]) -> list[BadItem]:
        """Take entries in, each item's first one; returns those that were not in the list before."""
        new = []
        for bad in sorted(entries, key=lambda bad: bad.position):
            if bad.item not in self._bad:
                self._bad[bad.item] = bad
                new.append(bad)
        return new
