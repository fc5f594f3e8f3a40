from __future__ import annotations

from pathlib import Path

import pytest

from cluster.train_cli import check_same_run, restore_config
from frepa_dist.config import RunConfig
from frepa_dist.runs import CONFIG
from shards.support.errors import ConfigError
from shards.support.settings import dump_yaml
from tests.frepa_dist.train.checkpoint.test_folders import create

GIVEN = {
    "method": {"name": "mae", "model": {"size": "tiny", "image_size": 64}},
    "data": {"root": "some/dataset"},
    "train": {"global_batch_size": 4, "micro_batch_size": 2, "steps": 12},
}


def given(tmp_path, **changes):
    config = {**GIVEN, "output": str(tmp_path)}
    return RunConfig.model_validate(
        {**config, **{key: {**config[key], **value} for key, value in changes.items()}}
    )


def test_a_requeued_job_goes_on_with_its_own_run_only(tmp_path):
    stored = given(tmp_path, data={"root": str(Path("some/dataset").resolve()), "snapshot": "abc"})
    check_same_run(given(tmp_path), stored)  # what a run resolves for itself may differ
    with pytest.raises(ConfigError, match=r"train\.betas, train\.steps differ"):
        check_same_run(given(tmp_path, train={"steps": 13, "betas": [0.9, 0.99]}), stored)
    with pytest.raises(ConfigError, match=r"data\.snapshot differ"):
        check_same_run(given(tmp_path, data={"snapshot": "xyz"}), stored)
    with pytest.raises(ConfigError, match=r"data\.root differ"):
        check_same_run(given(tmp_path, data={"root": "s3://bucket/dataset"}), stored)


def test_a_folder_is_restored_only_for_the_run_whose_copies_these_are(tmp_path):
    place, run = tmp_path / "copies", tmp_path / "run"
    create(place, 2)
    stored = given(tmp_path / "elsewhere", data={"root": str(Path("some/dataset").resolve())})
    (place / CONFIG).write_text(dump_yaml(stored.model_dump(mode="json")))
    with pytest.raises(ConfigError, match=r"train\.steps differ"):
        restore_config(given(run, train={"steps": 13}), str(place))
    assert not run.exists(), "a refused command leaves nothing in the way of the next"
    restore_config(given(run), str(place))
    assert (run / CONFIG).read_bytes() == (place / CONFIG).read_bytes()
    restore_config(given(tmp_path / "other"), str(tmp_path / "nothing"))
    assert not (tmp_path / "other").exists()
