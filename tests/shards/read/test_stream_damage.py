"""The loader on damaged and missing shards: an error that names them, or a replacement by position."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from shards.support.errors import DataError
from tests.shards.streams import assert_equal, join, stream_of


class TestDamage:
    """Shard 1, samples 9 to 22, is cut short: its later half is gone."""

    @pytest.fixture
    def damaged(self, tmp_path, write_dataset) -> Path:
        write_dataset(tmp_path, {"fundus": [9, 14, 11], "xray": [12]}, duplicates=(4, 20))
        shard = tmp_path / "fundus/tiny-000001.tar"
        os.truncate(shard, shard.stat().st_size // 2)
        return tmp_path

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_fail_names_shard_and_key(self, damaged, num_workers):
        one_line = r"^\S*fundus/tiny-000001.tar, sample sample000\d\d: [^\n]*cut short[^\n]*$"
        with pytest.raises(DataError, match=one_line):
            list(stream_of(damaged, num_workers=num_workers).batches(0))

    def test_skip_replaces_by_position_and_reports(self, damaged, stream_root):
        intact = [join(batch) for batch in stream_of(stream_root).batches(0)]
        runs = []
        for world_size, num_workers in ((1, 0), (1, 1), (2, 0)):
            ranks = [
                list(
                    stream_of(damaged, rank, world_size, num_workers=num_workers, bad_samples="skip").batches(
                        0
                    )
                )
                for rank in range(world_size)
            ]
            runs.append([[micro for part in parts for micro in part] for parts in zip(*ranks, strict=True)])
        assert_equal(runs[0], runs[1])
        assert_equal(runs[0], runs[2])
        reports = [[s for batch in run for micro in batch for s in micro["skipped"]] for run in runs]
        assert reports[0] == reports[1] == reports[2]
        assert len(reports[0]) >= 5
        replaced = {s["position"] for s in reports[0]}
        for report in reports[0]:
            assert report["sample"].startswith(f"{damaged}/fundus/tiny-000001.tar, sample sample000")
            assert "cut short" in report["reason"]
        for before, after in zip(intact, map(join, runs[0]), strict=True):
            for i, position in enumerate(before["position"].tolist()):
                if position in replaced:
                    assert before["key"][i] != after["key"][i]
                    assert int(after["key"][i][-2:]) < 34  # fundus, as the sample it stands for
                    assert after["key"][i] not in ("sample00004", "sample00020")  # nor a duplicate
                else:
                    assert before["key"][i] == after["key"][i]
                    assert torch.equal(before["image"][i], after["image"][i])

    def test_skip_ends_when_nothing_is_left(self, damaged):
        for shard in (damaged / "fundus").glob("*.tar"):
            shard.unlink()
        with pytest.raises(DataError, match="9 samples drawn for one place in the plan are all damaged"):
            list(stream_of(damaged, bad_samples="skip").batches(0))


class TestMissing:
    """A shard or an index that is not there at all."""

    @pytest.mark.parametrize("suffix", [".tar", ".index.parquet"])
    def test_skip_replaces_and_fail_names_it(self, tmp_path, stream_root, write_dataset, suffix):
        write_dataset(tmp_path, {"fundus": [9, 14, 11], "xray": [12]}, duplicates=(4, 20))
        (tmp_path / f"fundus/tiny-000001{suffix}").unlink()
        with pytest.raises(DataError, match=rf"tiny-000001\{suffix}.*no such file"):
            list(stream_of(tmp_path).batches(0))
        intact = [join(batch) for batch in stream_of(stream_root).batches(0)]
        runs = [
            list(stream_of(tmp_path, num_workers=n, micro=micro, bad_samples="skip").batches(0))
            for n, micro in ((0, 2), (1, 8))
        ]
        skipped = {s["position"] for batch in runs[0] for micro in batch for s in micro["skipped"]}
        for before, after, again in zip(intact, map(join, runs[0]), map(join, runs[1]), strict=True):
            assert after["key"] == again["key"]
            assert torch.equal(after["image"], again["image"])
            for i, position in enumerate(before["position"].tolist()):
                was_lost = 9 <= int(before["key"][i][-2:]) < 23
                assert was_lost == (position in skipped) == (before["key"][i] != after["key"][i])
