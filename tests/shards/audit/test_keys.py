"""Keys are compared through hashes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from shards.audit.keys import hash_keys


def test_hashes_of_keys_do_not_depend_on_the_company():
    keys = ["", "a", "ab", "a" * 24, "b" * 40]
    together = hash_keys(pa.chunked_array([keys]))
    assert len(set(together.tolist())) == len(keys)
    for key, known in zip(keys, together, strict=True):
        assert hash_keys(pa.chunked_array([[key]]))[0] == known
    assert hash_keys(pa.chunked_array([[]], pa.string())).size == 0
    many = pa.chunked_array([[f"{number:024x}" for number in range(200_000)]])
    assert len(np.unique(hash_keys(many))) == 200_000
