"""A fork restates a checkpoint under changed settings, in another run, and says what has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from frepa_dist.config import RunConfig
from frepa_dist.runs import CONFIG, checkpoint_name, find_checkpoint, load_run_config, read_json_lines
from frepa_dist.train.checkpoint.files import write_bytes
from frepa_dist.train.checkpoint.folders import damage
from frepa_dist.train.checkpoint.fork import fork_run, is_forkable
from frepa_dist.train.checkpoint.resume import check_same_run, read_state
from shards.support.errors import ConfigError, DataError
from shards.support.settings import dump_yaml, merge

STEP = 4


def make_config(output, **over):
    data = {
        "output": str(output),
        "method": {"name": "retmae", "model": {"size": "tiny", "image_size": 64}},
        "data": {"root": "shards", "snapshot": "abc"},
        "train": {"global_batch_size": 4, "micro_batch_size": 2, "steps": 8, "precision": "fp32"},
    }
    return RunConfig.model_validate(merge(data, over))


@pytest.fixture
def source(tmp_path):
    """A run with a checkpoint whose weights are a few bytes."""
    run = tmp_path / "source"
    folder = run / "checkpoints" / checkpoint_name(STEP)
    folder.mkdir(parents=True)
    config = make_config(run).model_dump(mode="json")
    (run / CONFIG).write_text(dump_yaml(config))
    state = {"format": 1, "config": config, "snapshot": "abc", "step": STEP, "state": {"step": STEP}}
    files = [write_bytes(folder / "state.json", [json.dumps(state).encode()])]
    files += [write_bytes(folder / "rank-00000.safetensors", [b"weights"])]
    entries = {file.name: {"size": file.size, "crc32c": file.crc32c} for file in files}
    (folder / "manifest.json").write_text(json.dumps({"step": STEP, "files": entries}))
    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_fork_is_a_run_under_its_own_config_and_says_what_it_changed(source, tmp_path):
    before, target = content(source), tmp_path / "fork"
    config = make_config(
        target, method={"hmi": {"weight": 0.4}, "mask_ratio": 0.6}, data={"root": "elsewhere"}
    )
    changed = fork_run(source, STEP, target, config)
    assert content(source) == before
    folder = find_checkpoint(target)
    assert damage(folder) is None
    stored = load_run_config(target)
    assert (stored.method.hmi.weight, stored.data.root, stored.output) == (0.4, "shards", target)
    check_same_run(read_state(folder), stored, "abc", folder)  # as strict as for any run, and content
    with pytest.raises(ConfigError, match=r"hmi\.weight"):
        check_same_run(read_state(folder), make_config(target), "abc", folder)
    assert {key for key in changed if key != "output"} == {"method.hmi.weight", "method.mask_ratio"}
    (event,) = read_json_lines(target / "events.jsonl")
    assert (event["event"], event["run"], event["step"]) == ("forked", str(source), STEP)
    assert event["changed"] == {"method.hmi.weight": [0.1, 0.4], "method.mask_ratio": [0.75, 0.6]}


@pytest.mark.parametrize(
    "over",
    [
        {"method": {"model": {"size": "small"}}},
        {"method": {"hmi": None}},
        {"train": {"seed": 3}},
        {"train": {"steps": 9}},
        {"data": {"flip": False}},
    ],
    ids=["network", "term", "seed", "length", "views"],
)
def test_what_makes_a_checkpoint_meaningless_cannot_change(source, tmp_path, over):
    data = make_config(tmp_path / "fork").model_dump(mode="json")
    config = RunConfig.model_validate(
        {**data, **{key: {**data[key], **value} for key, value in over.items()}}
    )
    with pytest.raises(ConfigError, match="cannot change"):
        fork_run(source, STEP, tmp_path / "fork", config)
    assert not (tmp_path / "fork" / CONFIG).exists()


def test_a_damaged_checkpoint_and_a_used_folder_are_refused(source, tmp_path):
    fork_run(source, STEP, tmp_path / "fork", make_config(tmp_path / "fork"))
    with pytest.raises(ConfigError, match="holds a run"):
        fork_run(source, STEP, tmp_path / "fork", make_config(tmp_path / "fork"))
    weights = find_checkpoint(source) / "rank-00000.safetensors"
    weights.write_bytes(b"weighty")
    with pytest.raises(DataError, match="damaged"):
        fork_run(source, STEP, tmp_path / "other", make_config(tmp_path / "other"))


def test_a_fork_that_was_killed_half_way_is_begun_anew(source, tmp_path):
    partial = tmp_path / "fork" / "checkpoints" / f"partial-{checkpoint_name(STEP)}"
    partial.mkdir(parents=True)
    (partial / "rank-00000.safetensors").write_text("half")
    whole = tmp_path / "fork" / "checkpoints" / checkpoint_name(STEP)
    whole.mkdir()
    fork_run(source, STEP, tmp_path / "fork", make_config(tmp_path / "fork"))
    assert [path.name for path in (tmp_path / "fork" / "checkpoints").iterdir()] == [checkpoint_name(STEP)]


def test_what_a_sweep_may_change_in_mid_run():
    assert is_forkable("method.hmi.weight")
    assert is_forkable("train.base_learning_rate")
    assert not is_forkable("data.crop_scale")
    assert not is_forkable("method.model.size")
