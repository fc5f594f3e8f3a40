"""Files of JSON lines that grow are read once."""

from __future__ import annotations

import json

from frepa_dist.follow import Follower
from shards.stores.atomic import replace_text


def lines(*numbers):
    return "".join(json.dumps({"step": number}) + "\n" for number in numbers)


def steps(found):
    return [record["step"] for record in found[1]]


def test_what_is_appended_is_read_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.read() == (False, []), "it need not be there yet"
    path.write_text(lines(1, 2))
    found = follower.read()
    assert (found[0], steps(found)) == (True, [1, 2])
    with path.open("a") as file:
        file.write(lines(3) + '{"step": ')
    assert steps(follower.read()) == [3]
    assert follower.read() == (False, []), "half a line waits for its other half"
    with path.open("a") as file:
        file.write("4}\nnonsense\n" + lines(5))
    assert steps(follower.read()) == [4, 5]


def test_a_file_that_was_written_anew_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2, 3))
    follower = Follower(path)
    follower.read()
    replace_text(path, lines(1, 9, 10, 11))  # longer than before: its size tells nothing
    found = follower.read()
    assert (found[0], steps(found)) == (True, [1, 9, 10, 11])
    path.unlink()
    assert follower.read() == (True, []), "what was read is gone"
    assert follower.read() == (False, [])


def test_of_a_large_file_the_end_is_read_and_then_only_what_is_new(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(*range(100_000)))
    follower = Follower(path, last_bytes=1000)
    found = steps(follower.read())
    assert found == list(range(found[0], 100_000))
    assert 40 < len(found) < 80
    with path.open("a") as file:
        file.write(lines(7))
    assert follower._offset < path.stat().st_size
    assert steps(follower.read()) == [7]
    short = Follower(path, last_bytes=10**9)
    assert len(steps(short.read())) == 100_001


def test_the_end_may_begin_with_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2))
    assert steps(Follower(path, last_bytes=len(lines(2))).read()) == [2]
