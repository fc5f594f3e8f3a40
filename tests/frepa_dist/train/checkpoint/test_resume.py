"""What may differ when a run goes on, and what is refused with which words."""

from __future__ import annotations

import json

import pytest
import torch

from frepa_dist.config import RunConfig
from frepa_dist.runs import read_json_lines
from frepa_dist.train.checkpoint.resume import FORMAT, _report, check_same_run, read_state
from frepa_dist.train.engines import World
from frepa_dist.train.records import describe_environment
from shards.support.errors import ConfigError, DataError
from shards.support.settings import load_settings


def config(*overrides: str) -> RunConfig:
    return load_settings(RunConfig, "demo/retmae", overrides)


def stored(*overrides: str) -> dict[str, object]:
    dumped = json.loads(json.dumps(config(*overrides).model_dump(mode="json")))
    return {"snapshot": "abc", "config": dumped}


def test_the_same_run_goes_on(tmp_path):
    assert check_same_run(stored(), config(), "abc", tmp_path) == []


@pytest.mark.parametrize(
    "change", ["train.micro_batch_size=4", "train.zero_stage=1", "data.num_workers=1", "train.keep_best=loss"]
)
def test_what_decides_no_number_may_change(tmp_path, change):
    (words,) = check_same_run(stored(), config(change), "abc", tmp_path)
    assert words.startswith(f"{change.partition('=')[0]}: ")
    assert words.endswith(f"-> {change.partition('=')[2]}")


@pytest.mark.parametrize(
    "change",
    [
        "train.base_learning_rate=1",
        "train.global_batch_size=64",
        "train.steps=170",
        "train.seed=3",
        "train.precision=fp32",
        "method.mask_ratio=0.5",
        "data.hf_keep=0.5",
        "data.crop_scale=[0.1, 1]",
    ],
)
def test_another_config_is_refused_with_both_values(tmp_path, change):
    key, _, value = change.partition("=")
    with pytest.raises(ConfigError, match="settings have changed") as caught:
        check_same_run(stored(), config(change), "abc", tmp_path)
    text = str(caught.value)
    assert key in text
    assert "config.yaml" in text
    assert f"-> {json.loads(value) if value[0] in '0123456789[' else value}"[:6] in text


WEIGHTS, DIGESTS = "data.modality_weights", "data.hf_digests"


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [
        (WEIGHTS, "uniform", "{alpha: 0.5}"),
        (WEIGHTS, "{}", "{ct: 5}"),
        (WEIGHTS, "{ct: 1}", "{ct: 1, mri: 4}"),
        (DIGESTS, "null", "{ct: abc}"),
        ("method.hmi", "null", "{}"),
    ],
)
def test_settings_that_appear_or_become_others_are_refused_too(tmp_path, key, before, now):
    for one, other in ((before, now), (now, before)):
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            check_same_run(stored(f"{key}={one}"), config(f"{key}={other}"), "abc", tmp_path)


def test_another_dataset_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="trained on snapshot abc, not on other"):
        check_same_run(stored(), config(), "other", tmp_path)


def test_a_setting_that_is_new_since_does_not_hinder(tmp_path):
    older = stored()
    del older["config"]["train"]["seed"]
    assert check_same_run(older, config(), "abc", tmp_path) == []


@pytest.mark.parametrize("content", [None, "{", '{"format": 0}', "[]", "{}"])
def test_a_checkpoint_of_another_version_is_refused_in_words(tmp_path, content):
    if content is not None:
        (tmp_path / "state.json").write_text(content)
    with pytest.raises(DataError, match="no checkpoint that this version can go on from"):
        read_state(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps({"format": FORMAT}))
    assert read_state(tmp_path)


def test_another_torch_is_allowed_told_and_written_down(tmp_path, capsys):
    world = World(0, 0, 1, torch.device("cpu"))
    before = {**describe_environment(world), "python": "3.11.0"}
    before["packages"] = {**before["packages"], "torch": "2.11.0"}
    run = tmp_path / "run"
    folder = run / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    _report(folder, run, {"environment": before}, ["data.num_workers: 2 -> 1"], world)
    assert f"packages.torch: 2.11.0 -> {torch.__version__.partition('+')[0]}" in capsys.readouterr().err
    (event,) = read_json_lines(run / "events.jsonl")
    assert event["event"] == "changed"
    assert event["settings"] == ["data.num_workers: 2 -> 1"]
    assert len(event["environment"]) == 2
