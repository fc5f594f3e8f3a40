"""What a run writes down, line by line, also where the disk is full."""

from __future__ import annotations

from frepa_dist.journal import append_event, append_line
from frepa_dist.runs import read_json_lines
from tests.small_disk import run_on_small_disk

FILL = """
import sys
from pathlib import Path
from frepa_dist.journal import append_line
from frepa_dist.runs import read_json_lines

disk = Path(sys.argv[1])
log = disk / "metrics.jsonl"
append_line(log, {"step": 1, "text": "x" * 4000})
filler = disk / "filler"
with filler.open("wb", buffering=0) as file:
    try:
        while file.write(bytes(1024)):
            pass
    except OSError:
        pass
append_line(log, {"step": 2, "text": "y" * 9000})
assert [record["step"] for record in read_json_lines(log)] == [1], log.read_text()[4000:]
filler.unlink()
append_line(log, {"step": 3})
assert [record["step"] for record in read_json_lines(log)] == [1, 3]
"""


def test_lines_are_appended(tmp_path):
    append_line(tmp_path / "metrics.jsonl", {"step": 1})
    append_line(tmp_path / "metrics.jsonl", {"step": 2, "text": "ä"})
    assert read_json_lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2, "text": "ä"}]
    append_event(tmp_path, "start", step=0)
    (event,) = read_json_lines(tmp_path / "events.jsonl")
    assert (event["event"], event["step"]) == ("start", 0)


def test_a_full_disk_loses_a_line_and_no_other():
    result = run_on_small_disk(FILL, "64k")
    assert result.returncode == 0, result.stderr
    assert "the disk is full, a line is lost" in result.stderr
