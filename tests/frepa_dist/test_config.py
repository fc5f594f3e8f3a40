import pytest
from pydantic import ValidationError

from frepa_dist.config import RunConfig, TrainConfig
from shards.support.errors import ConfigError
from shards.support.settings import find_config, load_settings

SHIPPED = sorted(
    str(path.relative_to(find_config("demo/retmae").parents[1]))
    for path in find_config("demo/retmae").parents[1].rglob("*.yaml")
)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_run_config_is_valid(name):
    assert load_settings(RunConfig, name).train.base_learning_rate > 0


def test_the_view_follows_the_model():
    config = load_settings(RunConfig, "demo/retmae", ["method.model.image_size=96"])
    assert config.stream_config().image_size == 96
    assert config.order_config().global_batch_size == config.train.global_batch_size


def test_an_unknown_key_is_named():
    with pytest.raises(ConfigError, match=r"unknown key 'train\.learning_rat'"):
        load_settings(RunConfig, "demo/retmae", ["train.learning_rat=1"])


def test_a_number_as_yaml_1_1_misreads_it_is_a_number():
    config = load_settings(RunConfig, "demo/retmae", ["train.base_learning_rate=1e-4"])
    assert config.train.base_learning_rate == 1e-4


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"epochs": 2}, "exactly one"),
        ({"steps": None}, "exactly one"),
        ({"micro_batch_size": 48}, "not a multiple"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "bf16 follow"),
    ],
)
def test_contradictions_are_refused(change, match):
    good = {"steps": 10, "global_batch_size": 64, "micro_batch_size": 32}
    TrainConfig(**good)
    with pytest.raises(ValidationError, match=match):
        TrainConfig(**{**good, **change})
