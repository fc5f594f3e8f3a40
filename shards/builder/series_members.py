"""Which objects belong to the series that a shard touches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.builder.objects import PlannedObject
from shards.builder.plan import Plan, as_planned


class SeriesMembers:
    """Looks up the objects of a series, in all parts of a plan.

    Args:
        parts: up to the one whose shards are written, which is the last. A series that grew has the window of
            all its objects then known in its new shards; the old ones keep theirs.
    """

    def __init__(self, parts: Sequence[Plan]) -> None:
        own = _images(parts[-1])
        volumes = own["volume"].combine_chunks()
        gone = parts[-1].objects["supersedes"]
        earlier = []
        for part in parts[:-1]:
            rows = _images(part)
            is_shared = pc.is_in(rows["volume"], value_set=volumes)
            is_gone = pc.is_in(rows["object"], value_set=gone.combine_chunks())
            earlier.append(rows.filter(pc.and_(is_shared, pc.invert(is_gone))))
        self._rows = pa.concat_tables([*earlier, own]).combine_chunks()
        encoded = self._rows["volume"].combine_chunks().dictionary_encode()
        codes = encoded.indices.to_numpy()
        self._names, self._order = encoded.dictionary, np.argsort(codes, kind="stable")
        self._codes = codes[self._order]

    def of(self, objects: Sequence[PlannedObject]) -> dict[str, list[PlannedObject]]:
        """All objects of each series that some objects belong to, each with all its units."""
        series = {item.volume for item in objects if item.in_series and item.volume is not None}
        if not series:
            return {}
        codes = pc.index_in(pa.array(sorted(series)), value_set=self._names).to_numpy()
        starts, ends = (np.searchsorted(self._codes, codes, side=side) for side in ("left", "right"))
        places = [self._order[start:end] for start, end in zip(starts, ends, strict=True)]
        rows = self._rows.take(pa.array(np.concatenate(places)))
        latest = {row["object"]: row for row in rows.to_pylist()}  # of an object that was tried again
        members: dict[str, list[PlannedObject]] = defaultdict(list)
        for row in latest.values():
            members[row["volume"]].append(as_planned(row, [(unit, "") for unit in range(row["num_units"])]))
        return dict(members)


def _images(part: Plan) -> pa.Table:
    rows = part.objects
    return rows.filter(pc.and_(pc.equal(rows["status"], "image"), rows["in_series"]))
