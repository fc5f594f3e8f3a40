from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import google_crc32c
import pytest

from shards.stores import cache as cache_module
from shards.stores.cache import ShardCache
from shards.stores.store import LocalStore, MissingFile
from shards.support.errors import ConfigError, DataError, EnvironmentFault
from tests.small_disk import run_on_small_disk

SIZE = 10_000


class Remote(LocalStore):
    """A folder that is slow, and writes down what it is asked, across processes.

    Attributes:
        damage: how many downloads from now on come with a wrong byte.
    """

    def __init__(self, folder: Path, seconds: float = 0.0) -> None:
        super().__init__(folder)
        self.seconds, self.damage = seconds, 0

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        with (self.folder / "asked").open("a") as log:
            log.write(f"{path}\n")
        time.sleep(self.seconds)
        data = super().read_range(path, offset, size)
        if self.damage:
            self.damage -= 1
            data = bytes([data[0] ^ 1]) + data[1:]
        return data

    def asked(self) -> list[str]:
        log = self.folder / "asked"
        return log.read_text().split() if log.exists() else []


@pytest.fixture
def remote(tmp_path) -> Remote:
    (tmp_path / "remote").mkdir()
    return Remote(tmp_path / "remote")


@pytest.fixture
def cache(tmp_path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 3 * SIZE)


def add(remote: Remote, name: str, size: int = SIZE) -> tuple[str, int, int]:
    """Make a shard; return its path, size and checksum."""
    data = (name.encode() * size)[:size]
    remote.write(name, data)
    return name, size, google_crc32c.value(data)


def names(cache: ShardCache) -> set[str]:
    """What is in the cache, without locks."""
    return {path.name.split("-", 2)[2] for path in cache.folder.iterdir() if not path.name.startswith(".")}


def test_a_shard_is_downloaded_once(remote, cache):
    shard = add(remote, "ct/a.tar")
    path = cache.fetch(remote, *shard)
    assert path.read_bytes() == remote.read("ct/a.tar")
    assert path.name == f"{shard[2]:08x}-{SIZE}-a.tar"
    assert cache.fetch(remote, *shard) == path
    assert ShardCache(cache.folder, 3 * SIZE).fetch(remote, *shard) == path
    assert remote.asked() == ["ct/a.tar"]
    assert (cache.folder.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)


def test_shards_of_one_name_do_not_mix(remote, cache):
    one, two = add(remote, "one/a.tar"), add(remote, "two/a.tar")
    assert cache.fetch(remote, *one).read_bytes() == remote.read("one/a.tar")
    assert cache.fetch(remote, *two).read_bytes() == remote.read("two/a.tar")


def test_parts(remote, cache, monkeypatch):
    """A shard of several parts comes in their order, with a last one that is shorter."""
    monkeypatch.setattr(
        cache_module, "read_parts", lambda read, n: original(read, n, part_bytes=1500, at_once=3)
    )
    data = os.urandom(SIZE)
    remote.write("a.tar", data)
    path = cache.fetch(remote, "a.tar", SIZE, google_crc32c.value(data))
    assert path.read_bytes() == data
    assert len(remote.asked()) == 7


original = cache_module.read_parts


def test_the_least_recently_used_goes_first(remote, cache):
    shards = {name: add(remote, f"{name}.tar") for name in "abcde"}
    for name in "abc":
        cache.fetch(remote, *shards[name])
    cache.fetch(remote, *shards["a"])  # used again: now b is the oldest
    cache.fetch(remote, *shards["d"])
    assert names(cache) == {"a.tar", "c.tar", "d.tar"}
    ShardCache(cache.folder, 2 * SIZE).fetch(remote, *shards["e"])
    assert names(cache) == {"d.tar", "e.tar"}


def test_an_open_shard_outlives_its_eviction(remote, cache):
    a = add(remote, "a.tar")
    descriptor, was_there = cache.open(remote, *a)
    assert not was_there
    for name in "bcd":
        cache.fetch(remote, *add(remote, f"{name}.tar"))
    assert "a.tar" not in names(cache)
    assert os.pread(descriptor, SIZE, 0) == remote.read("a.tar")
    os.close(descriptor)


def test_a_shard_must_fit(remote, cache):
    with pytest.raises(ConfigError, match="the cache may have 30000"):
        cache.fetch(remote, *add(remote, "big.tar", 3 * SIZE + 1))
    cache.fetch(remote, *add(remote, "fits.tar", 3 * SIZE))
    assert names(cache) == {"fits.tar"}


def test_wrong_bytes_are_downloaded_again_and_never_kept(remote, cache):
    a = add(remote, "a.tar")
    remote.damage = 1
    assert cache.fetch(remote, *a).read_bytes() == remote.read("a.tar")
    assert len(remote.asked()) == 2
    b = add(remote, "b.tar")
    remote.damage = 100
    with pytest.raises(DataError, match=r"b\.tar: not the shard of the snapshot"):
        cache.fetch(remote, *b)
    assert names(cache) == {"a.tar"}


def test_short_writes_are_gone_on_with(remote, cache, monkeypatch):
    """A file system may take less than it is given; the checksum is of what came, not of what was written."""
    data = os.urandom(SIZE)
    remote.write("a.tar", data)
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, part, offset: write(fd, part[:999], offset))
    assert cache.fetch(remote, "a.tar", SIZE, google_crc32c.value(data)).read_bytes() == data


@pytest.mark.parametrize("size", [SIZE - 1, 0])
def test_a_short_shard_is_refused(remote, cache, size):
    path, _, crc32c = add(remote, "a.tar")
    remote.write("a.tar", remote.read("a.tar")[:size])
    with pytest.raises(DataError, match="not the shard of the snapshot"):
        cache.fetch(remote, path, SIZE, crc32c)
    with pytest.raises(MissingFile):
        cache.fetch(remote, "none.tar", SIZE, crc32c)
    assert names(cache) == set()


def test_a_cut_entry_is_replaced(remote, cache):
    a = add(remote, "a.tar")
    os.truncate(cache.fetch(remote, *a), SIZE - 1)
    assert cache.fetch(remote, *a).read_bytes() == remote.read("a.tar")


def fetch_in_process(cache: ShardCache, remote: Remote, shard: tuple[str, int, int]) -> bytes:
    return cache.fetch(remote, *shard).read_bytes()


def test_processes_and_threads_wait_for_one_download(remote, cache):
    a = add(remote, "a.tar")
    remote.seconds = 0.3
    with multiprocessing.get_context("fork").Pool(3) as pool, ThreadPoolExecutor(3) as threads:
        others = [pool.apply_async(fetch_in_process, (cache, remote, a)) for _ in range(3)]
        ours = [threads.submit(cache.fetch, remote, *a) for _ in range(3)]
        data = [other.get() for other in others] + [one.result().read_bytes() for one in ours]
    assert data == [remote.read("a.tar")] * 6
    assert remote.asked() == ["a.tar"]


def size_of(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def test_downloads_wait_for_room(remote, tmp_path):
    """Room that is taken by other downloads comes back: nothing is ever above the limit, nothing fails."""
    cache = ShardCache(tmp_path / "cache", 2 * SIZE)
    shards = [add(remote, f"{name}.tar") for name in "abcdef"]
    remote.seconds, most = 0.05, 0
    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(cache.open, remote, *shard) for shard in shards]
        while not all(future.done() for future in futures):
            with cache._locked("folder"):
                most = max(most, sum(map(size_of, cache.folder.iterdir())))
    for (name, *_), future in zip(shards, futures, strict=True):
        descriptor, _ = future.result()
        assert os.pread(descriptor, SIZE, 0) == remote.read(name)
        os.close(descriptor)
    assert 0 < most <= 2 * SIZE


def test_a_killed_download_leaves_nothing_that_counts(remote, cache):
    a, b = add(remote, "a.tar"), add(remote, "b.tar", 3 * SIZE)
    remote.seconds = 60
    process = multiprocessing.get_context("fork").Process(target=cache.fetch, args=(remote, *a))
    process.start()
    while not names(cache):
        time.sleep(0.01)
    (torn,) = names(cache)
    assert ".frepa-tmp-" in torn
    live = ShardCache(cache.folder, 3 * SIZE)
    assert names(live) == {torn}  # a live download is left alone
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    remote.seconds = 0
    assert cache.fetch(remote, *a).read_bytes() == remote.read("a.tar")
    assert names(cache) == {"a.tar"}
    cache.fetch(remote, *b)
    assert names(cache) == {"b.tar"}


def test_a_crash_is_cleaned_up_at_the_start(remote, cache):
    a = add(remote, "a.tar")
    path = cache.fetch(remote, *a)
    path.with_name(f"{path.name}.frepa-tmp-1-2").write_bytes(b"half")
    assert names(ShardCache(cache.folder, 3 * SIZE)) == {"a.tar"}


def test_foreign_files_are_left_alone(remote, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mine.txt").write_text("keep")
    cache = ShardCache(tmp_path / "cache", SIZE)
    for name in "ab":
        cache.fetch(remote, *add(remote, f"{name}.tar"))
    assert (tmp_path / "cache" / "mine.txt").read_text() == "keep"


def test_a_forked_child_holds_no_lock(remote, cache):
    """Data loaders fork while a thread of their parent downloads; their copies must not keep its locks."""
    a = add(remote, "a.tar")
    remote.seconds = 0.3
    thread = threading.Thread(target=cache.fetch, args=(remote, *a))
    thread.start()
    while not names(cache):
        time.sleep(0.01)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    thread.join()
    try:
        with ThreadPoolExecutor(1) as pool:
            cache.fetch(remote, *a).unlink()
            pool.submit(cache.fetch, remote, *a).result(timeout=10)
    finally:
        child.kill()
        child.join()
    assert names(cache) == {"a.tar"}


class TestPrefetch:
    def test_shards_come_in_the_background(self, remote, tmp_path):
        cache = ShardCache(tmp_path / "cache", 10 * SIZE)
        a, b = add(remote, "a.tar"), add(remote, "b.tar")
        remote.seconds = 0.1
        start = time.monotonic()
        cache.prefetch(remote, [a, b])
        assert time.monotonic() - start < 0.1
        wait_for(lambda: names(cache) == {"a.tar", "b.tar"})
        cache.prefetch(remote, [a])  # a second thread, or the first one; nothing is asked again
        cache.fetch(remote, *b)
        assert remote.asked() == ["a.tar", "b.tar"]

    def test_half_of_the_cache_at_most(self, remote, tmp_path):
        cache = ShardCache(tmp_path / "cache", 5 * SIZE)
        cache.prefetch(remote, [add(remote, f"{name}.tar") for name in "abcd"])
        wait_for(lambda: names(cache) == {"a.tar", "b.tar"})
        wait_for(lambda: cache._prefetcher is None)
        assert names(cache) == {"a.tar", "b.tar"}

    def test_errors_are_said_by_fetch(self, remote, cache):
        good = add(remote, "good.tar")
        missing = ("missing.tar", 10, 0)
        cache.prefetch(remote, [missing, good])
        wait_for(lambda: names(cache) == {"good.tar"})
        with pytest.raises(MissingFile):
            cache.fetch(remote, *missing)

    def test_a_new_wish_replaces_the_old(self, remote, tmp_path):
        cache = ShardCache(tmp_path / "cache", 20 * SIZE)
        shards = [add(remote, f"{name}.tar") for name in "abcd"]
        remote.seconds = 0.2
        cache.prefetch(remote, shards[:3])
        wait_for(lambda: remote.asked() == ["a.tar"])
        cache.prefetch(remote, shards[3:])
        wait_for(lambda: cache._prefetcher is None)
        assert remote.asked() == ["a.tar", "d.tar"]


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_copies(remote, cache):
    a = add(remote, "a.tar")
    cache.prefetch(remote, [a])
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.folder, copy.max_bytes) == (cache.folder, cache.max_bytes)
    assert copy.fetch(remote, *a).exists()


def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    if owner == 0:
        os.chown(tmp_path, 12345, 12345)
    with pytest.raises(EnvironmentFault, match="belongs to another user"):
        ShardCache(tmp_path, 1)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="the cache cannot be written"):
        ShardCache(tmp_path / "file" / "cache", 1)


FULL_DISK = """
import os, sys
from pathlib import Path
import google_crc32c
from shards.stores.cache import ShardCache
from shards.stores.store import LocalStore
from shards.support.errors import EnvironmentFault
disk, remote = Path(sys.argv[1]), LocalStore(Path(sys.argv[2]))
cache = ShardCache(disk / "cache", 1 << 30)
def fetch(name):
    data = remote.read(name)
    return cache.fetch(remote, name, len(data), google_crc32c.value(data)).read_bytes() == data
assert fetch("a") and fetch("b")             # 2.5 of 3 MiB
assert fetch("c"), "a was to make room"       # the limit allows it, the disk does not
left = sorted(path.name[-1] for path in cache.folder.iterdir() if path.name[0] != ".")
assert left == ["b", "c"], left
for path in list(cache.folder.iterdir()):
    if path.name[0] != ".":
        path.unlink()
(disk / "others").write_bytes(bytes(5 << 19))  # 2.5 MiB of somebody else's
try:
    fetch("a")
except EnvironmentFault as error:
    assert "No space left" in str(error) and "cache" in str(error), error
else:
    raise SystemExit("no error")
assert not [path for path in cache.folder.iterdir() if path.name[0] != "."], "half a file is left"
(disk / "others").unlink()
assert fetch("a")
"""


def test_disk_full(tmp_path):
    """What others put on the disk makes the cache smaller; where nothing is left of it, the error says so."""
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode() * (5 << 18))
    result = run_on_small_disk(FULL_DISK, "3m", tmp_path)
    assert result.returncode == 0, result.stderr
