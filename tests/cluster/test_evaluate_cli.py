"""`frepa evaluate`: what it takes, what it writes, and that bad input is one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from cluster.cli import cli
from frepa_dist.config import RunConfig
from frepa_dist.evaluate.reconstruct import ReconstructionResult
from frepa_dist.methods.registry import METHODS
from frepa_dist.runs import checkpoint_name
from shards.support.errors import ConfigError, DataError
from shards.support.settings import dump_yaml


def invoke(*arguments):
    return CliRunner().invoke(cli, ["evaluate", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    config = RunConfig.model_validate(
        {
            "output": str(run),
            "method": {"name": "mae", "model": {"size": "tiny", "image_size": 32}},
            "data": {"root": "nowhere"},
            "train": {"steps": 7},
        }
    )
    (run / "config.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    checkpoint = run / "checkpoints" / checkpoint_name(7)
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    torch.manual_seed(0)
    student = METHODS["mae"].create_student(config.method)
    save_file(student.state_dict(), checkpoint / "student.safetensors")
    return run


def test_reconstruct_writes_what_it_says(run, images, tmp_path):
    out = tmp_path / "new" / "result.json"
    told = invoke("reconstruct", run, images, "--num", 2, "--modality", "oct", "--seed", 5, "--out", out)
    result = ReconstructionResult.model_validate(json.loads(out.read_text()))
    assert result.describe() in told.output
    assert (result.step, result.config.num, result.config.seed) == (7, 2, 5)
    assert {(row.modality, row.num_images) for row in result.rows} == {("oct", 2)}


def test_the_seed_chooses_what_is_hidden_and_nothing_else_changes(run, images):
    def table(*options):
        return invoke("reconstruct", run, images, *options).stdout

    assert table() == table("--seed", 0)
    assert table() != table("--seed", 1)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("{images}", "{images}"), DataError),
        (("{run}", "{images}/none"), DataError),
        (("{run}", "{images}", "--modality", "cat"), ConfigError),
    ],
)
def test_what_cannot_be_evaluated_is_an_error_for_people(run, images, arguments, error):
    with pytest.raises(error):
        invoke("reconstruct", *(part.format(run=run, images=images) for part in arguments))


def test_every_measure_is_offered():
    text = invoke("--help").output
    for name in ("probe", "cka", "reconstruct"):
        assert f"  {name} " in text
