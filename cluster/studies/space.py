"""What a sweep searches: keys of the experiment with the values they may take, and the points this makes."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from pydantic import Field, model_validator

from reactdiff.config import Branch

Point = dict[str, Any]
"""Dotted key -> value, in the order of the space; a key whose conditions do not hold is not in it."""


class Dimension(Branch):
    """The values of one key: a choice, a range or a range on a logarithmic axis; a range of whole bounds has whole numbers."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1, description="Values to choose from.")
    range: tuple[int | float, int | float] | None = Field(None, description="Least and largest value.")
    log_range: tuple[int | float, int | float] | None = Field(None, description="The same, even in the logarithm.")
    when: dict[str, Any] = Field({}, description="Keys above this one, and the value or list of values of each for which this one counts.")

    @model_validator(mode="after")
    def _one_kind(self) -> "Dimension":
        given = [kind for kind in ("choice", "range", "log_range") if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of choice, range and log_range, not {' and '.join(given) or 'none'}")
        if self.bounds:
            (low, high), log = self.bounds, self.log_range is not None
            if not low < high or (log and low <= 0):
                raise ValueError(f"{given[0]} is [{low}, {high}], but must rise{' and begin above 0' if log else ''}")
        return self

    @property
    def bounds(self) -> tuple[int | float, int | float] | None:
        """Least and largest value, None for a choice."""
        return self.range or self.log_range

    @property
    def whole(self) -> bool:
        """Whether a range has whole numbers only."""
        return bool(self.bounds) and all(isinstance(bound, int) for bound in self.bounds or ())

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Every value of a choice, both ends of a range."""
        return self.choice or self.bounds or ()

    def at(self, share: float) -> Any:
        """The value at this share of the way through, in [0, 1)."""
        if self.choice:
            return self.choice[int(share * len(self.choice))]
        assert self.bounds
        low, high = self.bounds
        end = high + 1 if self.whole else high
        value = low + share * (end - low) if self.range else low * (end / low) ** share
        return min(int(value), high) if self.whole else min(float(value), high)


class Space:
    """Dimensions by dotted key; a condition of one speaks of keys above it.

    Raises:
        ValueError: for a condition on a key that is not above, or on a value that this key cannot have, and for a key that never counts.
    """

    def __init__(self, dimensions: Mapping[str, Dimension]):
        self.dimensions = dict(dimensions)
        above: dict[str, Dimension] = {}
        for key, dimension in self.dimensions.items():
            for other in dimension.when:
                if other not in above:
                    raise ValueError(f"{key} counts when {other} has a value, but {other} does not stand above it in the space")
                values, there = _wanted(dimension, other), above[other].choice
                if there is None or (lacking := [value for value in values if value not in there]):
                    what = f"{lacking[0]!r} is none of its values" if there else "that is a range, and conditions are on choices"
                    raise ValueError(f"{key} counts when {other} is {values[0] if len(values) == 1 else values}, but {what}")
            above[key] = dimension
            if never := [other for other, values in self._needed(key).items() if not values]:
                raise ValueError(f"{key} never counts: the keys of its conditions count for other values of {never[0]} than it does")

    def point(self, value: Callable[[str, Dimension], Any]) -> Point:
        """The point whose keys have these values; asked from the first key to the last, and only for those that count."""
        point: Point = {}
        for key, dimension in self.dimensions.items():
            if _counts(dimension, point):
                point[key] = value(key, dimension)
        return point

    def draw(self, chance: Callable[[str], float]) -> Point:
        """The point at these shares of each key's way, in [0, 1)."""
        return self.point(lambda key, dimension: dimension.at(chance(key)))

    def grid(self) -> list[Point]:
        """Every point of a space of choices, the last key changing fastest.

        Raises:
            ValueError: if a key has a range.
        """
        if ranges := [key for key, dimension in self.dimensions.items() if not dimension.choice]:
            raise ValueError(f"{ranges[0]} has a range, of which a grid cannot try every value: give choices, or search: random or optuna")
        return list(self.points())

    @property
    def finite(self) -> bool:
        """Whether it has choices only."""
        return all(dimension.choice for dimension in self.dimensions.values())

    def points(self) -> Iterator[Point]:
        """The points of a space of choices, the last key changing fastest."""
        return self._points_from({}, list(self.dimensions))

    def _points_from(self, point: Point, keys: list[str]) -> Iterator[Point]:
        """Those that begin like this one; these keys are left."""
        if not keys:
            yield point
            return
        dimension = self.dimensions[keys[0]]
        for chosen in [{keys[0]: value} for value in dimension.extremes] if _counts(dimension, point) else [{}]:
            yield from self._points_from({**point, **chosen}, keys[1:])

    def corners(self) -> Iterator[Point]:
        """Points in which each key has each value of its choice, or each end of its range, at least once."""
        for key, dimension in self.dimensions.items():
            needed = {other: values[0] for other, values in self._needed(key).items()}
            for value in dimension.extremes:
                forced = {**needed, key: value}
                yield self.point(partial(_forced, forced))

    def _needed(self, key: str) -> dict[str, list[Any]]:
        """The values that other keys may have for this one to count, by its own conditions and by theirs."""
        needed: dict[str, list[Any]] = {}
        for other in self.dimensions[key].when:
            for name, values in {**self._needed(other), other: _wanted(self.dimensions[key], other)}.items():
                needed[name] = [value for value in needed.get(name, values) if value in values]
        return needed


def text_of(point: Mapping[str, Any]) -> str:
    """A point for people, and for Prometheus."""
    return ",".join(f"{key}={value_text(value)}" for key, value in point.items())


def value_text(value: Any) -> str:
    """A value as a table shows it."""
    return value if isinstance(value, str) else f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def _forced(forced: Point, key: str, dimension: Dimension) -> Any:
    return forced.get(key, dimension.extremes[0])


def _counts(dimension: Dimension, point: Point) -> bool:
    return all(other in point and point[other] in _wanted(dimension, other) for other in dimension.when)


def _wanted(dimension: Dimension, other: str) -> list[Any]:
    values = dimension.when[other]
    return values if isinstance(values, list) else [values]
