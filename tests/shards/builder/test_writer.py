"""What was committed of a shard."""

from __future__ import annotations

import pytest

from shards.builder.writer import ShardTask, read_committed, write_shard
from shards.stores.store import LocalStore
from tests.shards.building import make_config

PATH, INDEX = "fundus/images-000000.tar", "fundus/images-000000.index.parquet"


@pytest.fixture
def store(tmp_path) -> LocalStore:
    """Holds a shard of no unit."""
    store = LocalStore(tmp_path)
    write_shard(ShardTask(store, PATH, make_config().sample_spec(), "plan", ()))
    return store


def test_another_plan_or_tar_is_not_taken_over(store):
    assert read_committed(store, PATH, "plan", 0) is not None
    assert read_committed(store, PATH, "another plan", 0) is None
    assert read_committed(store, PATH, "plan", 0, 1023) is None
    store.delete(INDEX)
    assert read_committed(store, PATH, "plan", 0) is None


def test_a_damaged_index_is_none(store):
    """Arrow raises this and that, OSError and ValueError among them; each byte of its footer is tried."""
    data = store.read(INDEX)
    for place in range(data.rindex(b"frepa") - 40, len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        store.write(INDEX, bytes(damaged))
        found = read_committed(store, PATH, "plan", 0)
        assert found is None or (found.info, list(found.bad)) == (None, [])
    store.write(INDEX, data[:-9])
    assert read_committed(store, PATH, "plan", 0) is None
