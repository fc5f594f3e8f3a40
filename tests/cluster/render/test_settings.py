from __future__ import annotations

import pytest

from cluster.render.settings import LaunchConfig
from shards.support.errors import ConfigError
from shards.support.settings import apply_overrides, validate


def read(*overrides):
    return validate(LaunchConfig, apply_overrides({}, overrides), where="here")


@pytest.mark.parametrize(
    "key",
    [
        *("name", "slurm.partition", "slurm.account", "slurm.qos", "slurm.constraint", "slurm.gres"),
        *("slurm.log", "slurm.time_limit", "kubernetes.namespace", "kubernetes.image", "docker.base"),
        *("kubernetes.service_account", "kubernetes.storage_claim", "kubernetes.storage_class"),
        *("kubernetes.gpu_resource", "kubernetes.cache_size"),
    ],
)
@pytest.mark.parametrize("value", ["a b", "a\\nb", "$(x)", "`x`", "a;b", "", "a\\u2028b", "a\\n"])
def test_what_no_quotes_can_protect_is_refused(key, value):
    with pytest.raises(ConfigError, match=f"'{key}'"):
        read(f'{key}="{value}"')


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("slurm.partitoin=gpu", "unknown key 'slurm.partitoin'.*partition"),
        ("nodes=0", "'nodes'.*greater than or equal to 1"),
        ("gpus_per_node=64", "raise cpus_per_node"),
        ("storage=shared", "'storage'"),
        ("pretrain.overrides=[no]", r"'pretrain.overrides.0'"),
        (r'pretrain.output="a\nb"', "'pretrain.output'"),
        ('env={"A B": c}', "'env.A B"),
        ("kubernetes.secret_env.X.name=y", "kubernetes.secret_env.X.secret"),
    ],
)
def test_errors_name_the_key(override, words):
    with pytest.raises(ConfigError, match=words):
        read(override)


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "wandb_api_key", "HF_TOKEN", "DB_PASSWORD"])
def test_a_secret_is_refused_and_not_shown(name):
    with pytest.raises(ConfigError, match=r"kubernetes\.secret_env") as caught:
        read(f"env.{name}=hunter2")
    assert "hunter2" not in str(caught.value)
    given = {"secret": "s3", "key": "secret"}
    kubernetes = read(f"kubernetes.secret_env.{name}={given}").kubernetes
    assert kubernetes.secret_env[name].model_dump() == given


def test_places_are_in_the_storage_where_they_name_no_other():
    config = read("storage=/data/")
    assert config.place("runs/a") == "/data/runs/a"
    assert config.place("/scratch/a") == "/scratch/a"
    assert config.place("s3://bucket/a") == "s3://bucket/a"


def test_a_rank_for_each_gpu_unless_told_otherwise():
    assert read("gpus_per_node=8").ranks == 8
    assert read("gpus_per_node=0").ranks == 1
    assert read("gpus_per_node=0", "ranks_per_node=2").ranks == 2
