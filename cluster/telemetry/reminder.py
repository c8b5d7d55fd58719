"""When a wait is told to people: not at once, and not all the time."""

AFTER = 10.0
"""Seconds after which a wait is told."""

EVERY = 60.0
"""Seconds after which it is told again."""


class Reminder:
    """Of one wait at a time."""

    def __init__(self) -> None:
        self._told = 0.0

    @property
    def told(self) -> bool:
        """Whether the present wait was told."""
        return self._told > 0

    def due(self, waited: float) -> bool:
        """Whether a wait of so many seconds so far is to be told now; a short one is a new one."""
        if waited < AFTER:
            self._told = 0.0
            return False
        if self._told and waited < self._told + EVERY:
            return False
        self._told = waited
        return True
