"""Where the values of a setting come from; pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

from pydantic import model_validator

from shards.support.settings import Settings


class Distribution(Settings):
    """Values of one setting: exactly one of the kinds.

    Attributes:
        choice: each of these as likely as the others.
        grid: all of these, each crossed with all else.
        uniform, loguniform: between low and high.
        randint: whole numbers from low up to, and without, high.
    """

    choice: tuple[Any, ...] | None = None
    grid: tuple[Any, ...] | None = None
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    randint: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        named = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(f"name exactly one of {', '.join(type(self).model_fields)}")
        if self.range is None:
            if not self.values:
                raise ValueError(f"'{named[0]}' is an empty list")
            if len({repr(value) for value in self.values}) < len(self.values):
                raise ValueError(f"'{named[0]}' names a value twice")
        else:
            low, high = self.range
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"'{named[0]}' goes from a number to a larger one, not from {low} to {high}")
            if self.loguniform is not None and low <= 0:
                raise ValueError(f"'loguniform' is for numbers above 0, not for {low}")
        return self

    @property
    def values(self) -> tuple[Any, ...]:
        """Of a list, its values."""
        return self.choice or self.grid or ()

    @property
    def range(self) -> tuple[float, float] | None:
        """Of numbers, where they begin and end."""
        return self.randint or self.uniform or self.loguniform

    def ends(self) -> tuple[Any, ...]:
        """Values between which all others lie; of a list, all of them."""
        if self.randint is not None:
            return (self.randint[0], self.randint[1] - 1)
        return self.values if self.range is None else self.range

    def draw(self, u: float) -> Any:
        """The value at a share u in [0, 1) of the probability."""
        if self.values:
            return self.values[int(u * len(self.values))]
        if self.randint is not None:
            low, high = self.randint
            return low + int(u * (high - low))
        if self.loguniform is not None:
            low_log, high_log = math.log(self.loguniform[0]), math.log(self.loguniform[1])
            return self.clip(math.exp(low_log + u * (high_log - low_log)))  # but for rounding
        assert self.uniform is not None
        return self.uniform[0] + u * (self.uniform[1] - self.uniform[0])

    def clip(self, value: Any) -> Any:
        """Bring a value that was changed by a factor back to where it may lie."""
        if self.values:
            return value
        if self.randint is not None:
            return min(max(round(value), self.randint[0]), self.randint[1] - 1)
        assert self.range is not None
        return min(max(float(value), self.range[0]), self.range[1])


def flatten_space(space: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> distribution, from groups of groups: searchers take flat spaces only (ray #28753)."""
    flat: dict[str, Any] = {}
    for key, value in space.items():
        inner = isinstance(value, Mapping) and not value.keys() & Distribution.model_fields.keys()
        flat |= flatten_space(value, f"{prefix}{key}.") if inner and value else {f"{prefix}{key}": value}
    return flat
