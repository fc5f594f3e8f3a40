import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

import frepa_dist.train.__main__ as train
from frepa_dist.config import RunConfig, TrainConfig
from shards.read.access import RemoteConfig
from shards.support.errors import ConfigError
from shards.support.settings import dump_yaml, find_config, load_settings, parse_yaml

SHIPPED = sorted(
    str(path.relative_to(find_config("demo/retmae").parents[1]))
    for path in find_config("demo/retmae").parents[1].rglob("*.yaml")
    if path.parent.name not in ("shards", "sweep", "evaluate")  # of other commands
)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_run_config_is_valid(name):
    assert load_settings(RunConfig, name).train.base_learning_rate > 0


def test_the_view_follows_the_model():
    config = load_settings(RunConfig, "demo/retmae", ["method.model.image_size=96"])
    assert config.stream_config().image_size == 96
    assert config.order_config().global_batch_size == config.train.global_batch_size


def test_where_and_how_data_are_read_reaches_the_loader():
    settings = ["root=s3://bucket/a/prefix", "remote=range", "cache_dir=/scratch/cache", "cache_bytes=1000"]
    settings += ["hf_digests.fundus=0123abcd", "ct_windows.names=[lung, bone]", "bad_samples=skip"]
    config = load_settings(RunConfig, "demo/retmae", [f"data.{setting}" for setting in settings])
    again = RunConfig.model_validate(parse_yaml(dump_yaml(config.model_dump(mode="json"))))
    for stream in (config.stream_config(), again.stream_config()):
        assert stream.root == "s3://bucket/a/prefix"
        assert stream.remote_config == RemoteConfig("range", Path("/scratch/cache"), 1000)
        assert stream.hf_digests == {"fundus": "0123abcd"}
        assert stream.ct_windows.names == ("lung", "bone")
        assert stream.bad_samples == "skip"


@pytest.mark.parametrize("weights", ["uniform", {"alpha": 0.5}, {"fundus": 2, "ct": 0.5}])
def test_the_balance_of_modalities_is_stored_as_given_and_reaches_the_order(weights):
    config = load_settings(RunConfig, "demo/retmae", [f"data.modality_weights={json.dumps(weights)}"])
    stored = parse_yaml(dump_yaml(config.model_dump(mode="json")))
    assert stored["data"]["modality_weights"] == weights
    for run in (config, RunConfig.model_validate(stored)):
        assert run.order_config().modality_weights == weights


@pytest.mark.parametrize("is_remote", [True, False])
def test_a_run_stores_where_its_data_are(tmp_path, monkeypatch, is_remote):
    """Whatever folder it is resumed from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load_snapshot", lambda *_: SimpleNamespace(hash="abc"))
    place = "s3://bucket/prefix" if is_remote else "data/shards"
    settings = [f"data.root={place}", "data.cache_dir=cache", "output=runs/one"]
    world = SimpleNamespace(is_main=True, from_main=lambda value: value)
    Path("runs/one").mkdir(parents=True)
    train.prepare_run(load_settings(RunConfig, "demo/retmae", settings), world)
    stored = load_settings(RunConfig, tmp_path / "runs/one/config.yaml")
    assert stored.data.root == (place if is_remote else str(tmp_path / place))
    assert stored.data.cache_dir == tmp_path / "cache"
    assert stored.data.snapshot == "abc"


def test_an_unknown_key_is_named():
    with pytest.raises(ConfigError, match=r"unknown key 'train\.learning_rat'"):
        load_settings(RunConfig, "demo/retmae", ["train.learning_rat=1"])


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ("data.modality_weights.ct=-1", r"data\.modality_weights'.*'ct' is -1"),
        ("data.modality_weights=even", r"data\.modality_weights'.*take `uniform`"),
        ("data.crop_scale=[0, 2]", r"data\.crop_scale"),
        ("data.crop_ratio=[1, 0.5]", r"data\.crop_ratio"),
        ("data.hf_keep=0.001", "keeps none of the 196 patches"),
    ],
)
def test_what_the_loader_refuses_is_refused_in_the_config(setting, match):
    with pytest.raises(ConfigError, match=match):
        load_settings(RunConfig, "demo/retmae", [setting])


def test_a_number_as_yaml_1_1_misreads_it_is_a_number():
    config = load_settings(RunConfig, "demo/retmae", ["train.base_learning_rate=1e-4"])
    assert config.train.base_learning_rate == 1e-4


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"epochs": 2}, "exactly one"),
        ({"steps": None}, "exactly one"),
        ({"micro_batch_size": 48}, "not a multiple"),
        ({"offload_optimizer": True, "zero_stage": 0}, "offload_optimizer needs"),
        ({"compile": True, "zero_stage": 3}, "compile does not go"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "bf16 follow"),
    ],
)
def test_contradictions_are_refused(change, match):
    good = {"steps": 10, "global_batch_size": 64, "micro_batch_size": 32}
    TrainConfig(**good)
    with pytest.raises(ValidationError, match=match):
        TrainConfig(**{**good, **change})
