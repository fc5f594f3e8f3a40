from __future__ import annotations

from pathlib import Path

import pytest

from cluster.train_cli import check_same_run
from frepa_dist.config import RunConfig
from frepa_dist.runs import CONFIG
from shards.support.errors import ConfigError
from shards.support.settings import dump_yaml

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
    (tmp_path / CONFIG).write_text(dump_yaml(stored.model_dump(mode="json")))
    check_same_run(given(tmp_path))  # what a run resolves for itself may differ
    with pytest.raises(ConfigError, match=r"train\.betas, train\.steps differ"):
        check_same_run(given(tmp_path, train={"steps": 13, "betas": [0.9, 0.99]}))
    with pytest.raises(ConfigError, match=r"data\.snapshot differ"):
        check_same_run(given(tmp_path, data={"snapshot": "xyz"}))
    with pytest.raises(ConfigError, match=r"data\.root differ"):
        check_same_run(given(tmp_path, data={"root": "s3://bucket/dataset"}))
