"""Which of many 64-bit hashes lie near some given ones: multi-index search by Hamming distance.

A hash is cut into four pieces of 16 bits. Two hashes that differ in at most `4 (k + 1) - 1` bits differ in at
most k bits in one of the pieces (Norouzi et al. 2012, arXiv 1307.2982). So the given hashes are written into
a table under every value that a piece of a near one may have, and the many stream past it, block by block:
memory does not grow with their number.

Hashes of images that look alike crowd in few values of a piece that covers their black corners. Pieces are
therefore made of bits from all over the image, and a hash that was found near is not looked up any further.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

PIECES, PIECE_BITS = 4, 16
MAX_RADIUS = 11  # beyond, a piece would be looked up under 697 values

_FIRST_WIDTH = 16  # hashes of a table's entry that are compared at first; the next time 4 times as many
_PAIRS_AT_ONCE = 1 << 21  # 48 MiB while distances are computed
_BIT_ORDER = np.random.default_rng(0).permutation(64)

Hashes = npt.NDArray[np.uint64]
Int = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


class NearHashes:
    """Tells which hashes lie within a distance of one of the given ones.

    Args:
        hashes: the given ones, (n,); repeated ones cost nothing.
        radius: the largest distance in bits that counts as near.
    """

    def __init__(self, hashes: Hashes, radius: int) -> None:
        if not 0 <= radius <= MAX_RADIUS:
            raise ValueError(f"a radius of {radius} bits; 0 to {MAX_RADIUS} can be searched")
        self.radius = radius
        self._hashes = _mix(np.unique(hashes))
        flips = _flips(radius // PIECES)
        self._tables = [_table(pieces, flips) for pieces in _pieces(self._hashes)]

    def is_near(self, hashes: Hashes) -> Bool:
        """Whether each hash (m,) is near; exact."""
        mixed = _mix(hashes)
        found = np.zeros(len(hashes), bool)
        for (starts, members), values in zip(self._tables, _pieces(mixed), strict=True):
            left, offset, width = np.flatnonzero(~found), 0, _FIRST_WIDTH
            while len(left):
                counts = starts[values[left] + 1] - starts[values[left]] - offset
                left, counts = left[counts > 0], counts[counts > 0]
                first = starts[values[left]] + offset
                for part in _cut(np.minimum(counts, width)):
                    num = np.minimum(counts[part], width)
                    others = self._hashes[members[_ranges(first[part], num)]]
                    bits = np.bitwise_count(others ^ np.repeat(mixed[left[part]], num))
                    nearest = np.minimum.reduceat(bits, np.cumsum(num) - num)
                    found[left[part]] |= nearest <= self.radius
                left = left[~found[left]]
                offset, width = offset + width, 4 * width
        return found


def _mix(hashes: Hashes) -> Hashes:
    """The same bits in another order; distances stay."""
    little = np.ascontiguousarray(hashes, "<u8").view(np.uint8).reshape(-1, 8)
    bits = np.unpackbits(little, axis=1)[:, _BIT_ORDER]
    return np.ascontiguousarray(np.packbits(bits, axis=1)).view("<u8").ravel().astype(np.uint64)


def _pieces(hashes: Hashes) -> list[Int]:
    mask = np.uint64((1 << PIECE_BITS) - 1)
    shifts = (np.uint64(PIECE_BITS * place) for place in range(PIECES))
    return [((hashes >> shift) & mask).astype(np.int64) for shift in shifts]


def _flips(most: int) -> Int:
    """What a piece is combined with (XOR) to get every value that differs in up to `most` bits."""
    bits = [1 << bit for bit in range(PIECE_BITS)]
    chosen = (some for num in range(most + 1) for some in itertools.combinations(bits, num))
    return np.array([sum(some) for some in chosen], np.int64)


def _table(pieces: Int, flips: Int) -> tuple[Int, npt.NDArray[np.int32]]:
    """Of each value v of a piece, the hashes that it may be near: members[starts[v] : starts[v + 1]]."""
    values = (pieces[:, None] ^ flips).astype(np.uint16).ravel()
    members = np.repeat(np.arange(len(pieces), dtype=np.int32), len(flips))
    order = np.argsort(values, kind="stable")
    counts = np.bincount(values, minlength=1 << PIECE_BITS)
    return np.concatenate([[0], np.cumsum(counts)]), members[order]


def _ranges(starts: Int, counts: Int) -> Int:
    """The numbers from each start on, `counts` of them, one after the other."""
    ends = np.cumsum(counts)
    return np.asarray(np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts), np.int64)


def _cut(counts: Int) -> list[Int]:
    """Cut the places of some counts into parts of about `_PAIRS_AT_ONCE` altogether."""
    if not len(counts):
        return []
    parts = np.cumsum(counts) // _PAIRS_AT_ONCE
    return np.split(np.arange(len(counts)), np.flatnonzero(np.diff(parts)) + 1)
