"""The search of near hashes against a plain loop, for hashes that crowd and for ones that do not."""

from __future__ import annotations

import numpy as np
import pytest

from shards.audit.hamming import MAX_RADIUS, NearHashes


def crowded(rng: np.random.Generator, num: int) -> np.ndarray:
    """Hashes of images that look alike: few starts, some bits flipped, most corners equal."""
    hashes = rng.integers(0, 2**64, 8, dtype=np.uint64)[rng.integers(0, 8, num)]
    for _ in range(8):
        hashes ^= np.uint64(1) << rng.integers(0, 40, num).astype(np.uint64)
    return hashes


@pytest.mark.parametrize("radius", [0, 3, 7, MAX_RADIUS])
def test_the_search_finds_what_a_plain_loop_finds(radius):
    rng = np.random.default_rng(radius)
    for given, stored in (
        (crowded(rng, 300), crowded(rng, 2000)),
        (rng.integers(0, 2**64, 50, dtype=np.uint64), rng.integers(0, 2**64, 500, dtype=np.uint64)),
    ):
        stored[:20] = given[:20] ^ np.uint64((1 << radius) - 1)
        expected = np.bitwise_count(stored[:, None] ^ given[None]).min(axis=1) <= radius
        assert expected[:20].all()
        np.testing.assert_array_equal(NearHashes(given, radius).is_near(stored), expected)


def test_nothing_is_near_nothing_and_large_radii_are_refused():
    assert not NearHashes(np.zeros(0, np.uint64), 7).is_near(np.zeros(5, np.uint64)).any()
    assert NearHashes(np.zeros(1, np.uint64), 7).is_near(np.zeros(0, np.uint64)).size == 0
    with pytest.raises(ValueError, match="0 to 11"):
        NearHashes(np.zeros(1, np.uint64), MAX_RADIUS + 1)
