"""The commands about networks, without a run."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from cluster.model_cli import backbones, cost
from frepa_dist.models import catalog
from shards.support.errors import ConfigError

FEW = ("vit_pico", "swin_pico", "resnet50")


@pytest.fixture(autouse=True)
def _few_backbones(monkeypatch):
    monkeypatch.setattr(catalog, "BACKBONES", {name: catalog.BACKBONES[name] for name in FEW})


def invoke(command, *arguments):
    return CliRunner().invoke(command, arguments, catch_exceptions=False)


def test_backbones_are_listed_with_what_they_cost():
    head, columns, *rows = invoke(backbones, "--image-size", "224").output.splitlines()
    assert head == "GFLOPs forward at 224 x 224"
    assert columns.split()[:3] == ["name", "timm", "stride"]
    assert [row.split()[0] for row in rows] == list(FEW)
    name, architecture, stride, width, parameters, gflops, tokens, weights, *sizes = rows[2].split()
    assert (name, architecture, stride, width) == ("resnet50", "resnet50_gn", "32", "2048")
    assert float(parameters) == pytest.approx(23.5, abs=0.1)
    assert float(gflops) == pytest.approx(8.2, abs=0.2)  # 4.1 G multiply-adds
    assert (tokens, weights, " ".join(sizes)) == ("no", "yes", "multiples of 32")


def test_backbones_as_json_and_a_size_that_only_some_take():
    rows = json.loads(invoke(backbones, "--image-size", "240", "--json").output)
    by_name = {row["name"]: row for row in rows}
    assert by_name["vit_pico"]["width"] == 64
    assert by_name["vit_pico"]["tokens"]
    assert "width" not in by_name["swin_pico"]
    text = invoke(backbones, "--image-size", "240").output
    assert text.splitlines()[3].split()[:6] == [
        "swin_pico",
        "swin_tiny_patch4_window7_224",
        "32",
        "-",
        "-",
        "-",
    ]
    with pytest.raises(ConfigError, match="no backbone takes images of 250 pixels"):
        invoke(backbones, "--image-size", "250")


def test_cost_of_a_shipped_config():
    arguments = ("--config", "demo/retmae", "--set", "train.global_batch_size=32", "--ranks", "2")
    counted = json.loads(invoke(cost, *arguments, "--json").output)
    assert set(counted["parameters"]) == {"student", "teacher", "teacher_critic"}
    assert counted["ranks"] == 2
    text = invoke(cost, *arguments).output
    (student,) = [line for line in text.splitlines() if line.startswith("parameters  student")]
    assert float(student.split()[2]) == pytest.approx(counted["parameters"]["student"] / 1e6, abs=0.01)
    (together,) = [line for line in text.splitlines() if "together" in line]
    assert float(together.split()[1]) == pytest.approx(sum(counted["memory"].values()) / 2**30, abs=0.01)
    assert "2 ranks" in together


def test_cost_of_settings_that_are_wrong():
    with pytest.raises(ConfigError, match="unknown key"):
        invoke(cost, "--config", "demo/retmae", "--set", "train.step=3")
    with pytest.raises(ConfigError, match="3"):
        invoke(cost, "--config", "demo/retmae", "--ranks", "3")
