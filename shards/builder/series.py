"""Windows of whole volumes: each value is measured once, over all objects of a series.

A volume that is cut by the end of a shard is measured by both tasks, over the same objects: so its slices get
the same window in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from shards.builder.objects import PlannedObject, open_planned, read_ahead, reading_object
from shards.formats.common import Decoded, Opened, Raw, ReadOptions, Unreadable
from shards.formats.intensity import IntensityRule, measure_window

HELD_BYTES = 256 << 20
"""Decoded slices kept between measuring a series and writing it; beyond, they are decoded again."""


class VolumeWindows:
    """Measures the window of a volume when its first deep unit asks for it, and keeps the last one.

    Args:
        series: objects of each volume that has several, by its id.
        rule: of the modality.
        options: how objects are read.
        roots: local folders that the sources lie in.
    """

    def __init__(
        self,
        series: Mapping[str, Sequence[PlannedObject]],
        rule: IntensityRule,
        options: ReadOptions,
        roots: Sequence[str],
    ) -> None:
        self._series, self._rule, self._options, self._roots = series, rule, options, roots
        self._volume = ""
        self._window = (0.0, 1.0)
        self._held: dict[tuple[int, int], Decoded] = {}
        self._held_bytes = 0

    def take(self, item: PlannedObject, unit: int) -> Decoded | None:
        """A unit that was decoded for measuring; it is given once."""
        return self._held.pop((item.number, unit), None)

    def holds(self, item: PlannedObject) -> bool:
        """Whether all units of an object are held."""
        return bool(item.units) and all((item.number, unit) in self._held for unit, _ in item.units)

    def will_hold(self, item: PlannedObject) -> bool:
        """Whether an object is read when its series is measured."""
        return self._rule.scope == "volume" and item.in_series

    def prepare(self, item: PlannedObject) -> None:
        """Measure the series that an object belongs to, if it has not been."""
        if self.will_hold(item) and item.volume not in (None, self._volume):
            assert item.volume is not None
            self._volume, self._held, self._held_bytes = item.volume, {}, 0
            self._window = measure_window(self._arrays(self._series[item.volume]), self._rule)

    def window(
        self, item: PlannedObject, opened: Opened | None, decoded: Decoded
    ) -> tuple[float, float] | None:
        """The window of the volume that a unit belongs to; None where the unit is to be measured alone."""
        if self._rule.scope != "volume" or item.volume is None or decoded.pixels.dtype == np.uint8:
            return None
        if not item.in_series and item.volume != self._volume:
            self._volume, self._held, self._held_bytes = item.volume, {}, 0
            assert opened is not None  # only units of a series are held
            with reading_object(item.uri, self._roots):
                self._window = measure_window(opened.arrays(), self._rule)
        return self._window

    def _arrays(self, items: Sequence[PlannedObject]) -> Iterator[Raw]:
        """Deep pixels of a series; what cannot be read is left out."""
        for item, fetched in read_ahead(items):
            try:
                with open_planned(item, self._options, self._roots, fetched) as (_, opened):
                    yield from self._decode_all(item, opened)
            except Unreadable:
                continue

    def _decode_all(self, item: PlannedObject, opened: Opened) -> Iterator[Raw]:
        for unit, _ in item.units:
            with reading_object(item.uri, self._roots):
                decoded = opened.decode(unit)
            if self._held_bytes + decoded.pixels.nbytes <= HELD_BYTES:
                self._held[item.number, unit] = decoded
                self._held_bytes += decoded.pixels.nbytes
            if decoded.pixels.dtype != np.uint8:
                yield decoded.pixels
