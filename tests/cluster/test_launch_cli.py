"""`frepa launch render`: what is wrong is said before a cluster is asked for machines."""

from __future__ import annotations

import pytest
import yaml

from shards.support.settings import parse_yaml
from tests.commands import frepa

RUN = """
base: demo/retmae
train: {global_batch_size: 48, micro_batch_size: 4}
"""


def test_options_settings_and_overrides_come_together(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "launch.yaml").write_text("nodes: 9\nslurm: {partition: gpu}\nstop_seconds: 100\n")
    common = ("--settings", tmp_path / "launch.yaml", "--config", tmp_path / "run.yaml", "--nodes", 3)
    common += ("--set", "slurm.account=lab", "--set", "pretrain.overrides=[train.steps=99]")
    ended = frepa("launch", "render", "--target", "slurm", *common, "--out", tmp_path / "jobs")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [str(path) for path in sorted((tmp_path / "jobs").iterdir())]
    lines = (tmp_path / "jobs/pretrain.sbatch").read_text().splitlines()
    expected = {"--nodes=3", "--partition=gpu", "--account=lab", "--signal=USR1@160"}
    assert {f"#SBATCH {line}" for line in expected} <= set(lines)
    assert lines[-7].split() == ["--set", "data.root=s3://datasets/retina", "\\"]
    assert f"--config {tmp_path / 'run.yaml'} \\" in [line.strip() for line in lines]
    ended = frepa("launch", "render", "--target", "kubernetes", *common, "--out", tmp_path / "manifests")
    assert ended.returncode == 0, ended.stderr
    text = (tmp_path / "manifests/pretrain-job.yaml").read_text()
    (configs,) = (each for each in yaml.safe_load_all(text) if each["kind"] == "ConfigMap")
    shown = parse_yaml(configs["data"]["config.yaml"])
    assert "base" not in shown
    assert shown["train"]["global_batch_size"] == 48
    assert shown["method"]["name"] == "retmae"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--nodes", 3), ("on 3 nodes with 4 ranks each", "1024", "12 ranks x micro-batch 128")),
        (("--config", "retmae/vit_bb"), ("no such config file", "retmae/vit_b.yaml")),
        (("--set", "pretrain.overrides=[train.stepps=3]"), ("train.stepps", "allowed here")),
        (("--set", "slurm.partitoin=gpu"), ("slurm.partitoin", "partition, account")),
        (("--settings", "none.yaml"), ("no such config file",)),
    ],
)
def test_what_is_wrong_is_said_and_nothing_written(tmp_path, arguments, words):
    ended = frepa("launch", "render", "--target", "slurm", *arguments, "--out", tmp_path / "jobs")
    assert ended.returncode == 2, ended.stderr
    assert all(word in ended.stderr for word in words), ended.stderr
    assert not (tmp_path / "jobs").exists()


def test_the_image_needs_no_run(tmp_path):
    ended = frepa("launch", "render", "--target", "docker", "--nodes", 3, "--out", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [str(tmp_path / "Dockerfile")]
