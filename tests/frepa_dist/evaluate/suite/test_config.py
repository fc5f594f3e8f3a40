"""Configs of suites: what is shipped is valid, what is wrong is said, published figures are the papers'."""

from __future__ import annotations

from pathlib import Path

import pytest

from frepa_dist.evaluate.suite.config import read_suite
from frepa_dist.evaluate.suite.kinds import RUNNERS
from frepa_dist.evaluate.suite.published import find_published, load_published
from frepa_dist.evaluate.suite.readings import READERS
from frepa_dist.evaluate.suite.sections import KINDS
from shards.support.errors import ConfigError
from shards.support.settings import dump_yaml

SHIPPED = sorted((Path(__file__).parents[4] / "configs" / "evaluate").glob("*.yaml"))
ENCODER = {"name": "a", "sources": ["random:tiny"]}
TASK = {"kind": "probe", "name": "t", "images": "images"}


def read(folder, **changes):
    path = folder / "suite.yaml"
    path.write_text(dump_yaml({"output": "out", "encoders": [ENCODER], "tasks": [TASK], **changes}))
    return read_suite(path)


def test_what_is_shipped_is_valid():
    assert {path.stem for path in SHIPPED} == {"retmae", "frepa"}
    configs = [read_suite(path) for path in SHIPPED]
    for config in configs:
        assert config.baseline.name == "MAE"
        assert all(task.modality for task in config.tasks)
        assert all(len(encoder.sources) == 3 for encoder in config.encoders)
    assert {task.kind for config in configs for task in config.tasks} == set(RUNNERS)


def test_every_kind_is_run_read_and_explained():
    assert RUNNERS.keys() == READERS.keys() == KINDS.keys()


def test_what_holds_for_all_holds_for_tasks_that_say_nothing_else(tmp_path):
    dense = {"kind": "segment", "name": "d", "images": "images", "masks": "table.csv"}
    config = read(
        tmp_path,
        seed=5,
        num_resamples=10,
        tasks=[TASK, {**TASK, "name": "own", "seed": 6, "num_resamples": 20}, dense,
               {"kind": "cka", "name": "c", "images": "images", "config": {"num": 8}}],
    )  # fmt: skip
    first, own, masks, cka = config.tasks
    assert (first.seed, first.num_resamples) == (5, 10)
    assert (own.seed, own.num_resamples) == (6, 20)
    assert (masks.training.seed, masks.num_resamples) == (5, 10)
    assert (cka.config.seed, cka.config.num) == (5, 8)
    assert config.baseline.name == "a"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": [{**TASK, "imagse": "x"}]}, "imagse"),
        ({"tasks": [{**TASK, "kind": "prob"}]}, "'probe'"),
        ({"tasks": [TASK, TASK]}, "two tasks are called 't'"),
        ({"encoders": [ENCODER, ENCODER]}, "two encoders are called 'a'"),
        ({"encoders": [{**ENCODER, "sources": []}]}, "at least 1"),
        ({"encoders": [{**ENCODER, "baseline": True}, {**ENCODER, "name": "b", "baseline": True}]},
         "more than one encoder is the baseline"),
        ({"encoders": [{**ENCODER, "pretrained_on": ["fundsu"]}]}, "no such modality: fundsu"),
        ({"tasks": [{**TASK, "published": "retmae/idird"}]}, "retmae/idrid"),
        ({"tasks": [{"kind": "segment", "name": "d", "images": "i", "masks": "t", "training": {"epoch": 1}}]},
         "allowed here: epochs, "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words) as raised:
        read(tmp_path, **changes)
    assert "output" not in str(raised.value)  # the whole config is no help


def test_grades_are_names_of_classes(tmp_path):
    assert read(tmp_path, tasks=[{**TASK, "classes": [0, 4]}]).tasks[0].classes == ("0", "4")


def test_a_single_source_may_stand_alone(tmp_path):
    assert read(tmp_path, encoders=[{"name": "a", "sources": "random:tiny"}]).encoders[0].sources == (
        "random:tiny",
    )


def test_published_figures_are_those_of_the_papers():
    def figures(key):
        return find_published(key).figures

    assert figures("retmae/idrid")["RetMAE"] == 0.816
    assert figures("retmae/chaksu") == {
        "MAE": 0.371, "RETFound": 0.464, "RetMAE": 0.516, "UrFound (aux)": 0.604, "MAE (aux)": 0.912,
        "RET-CLIP (aux)": 0.930, "RetMAE (aux)": 0.911,
    }  # fmt: skip
    assert figures("retmae/ablation")["HF masking + L_hmi"] == 0.737
    assert figures("retmae/fine-tuning") == {"RetMAE": 0.928, "RET-CLIP": 0.910, "RETFound": 0.876}
    assert figures("frepa/ct-denoise-psnr")["Frepa (Swin)"] == 32.70
    assert figures("frepa/ct-x2-ssim") == {"MAE": 0.877, "Frepa (ViT)": 0.908}
    # the papers' own means tell a slip of any figure
    sets = [figures(f"retmae/{name}") for name in ("idrid", "rfmid-dr", "rfmid-amd", "chaksu", "aptos")]
    for method, mean in figures("retmae/mean").items():
        assert sum(known[method] for known in sets) / 5 == pytest.approx(mean, abs=6e-4)
    assert all("openreview" in t.source or "arXiv" in t.source for t in load_published().values())
