"""The report: what it shows of a run, and that it says what a run does not have."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from frepa_dist.evaluate.cka import CkaConfig, CkaResult, CkaRow
from frepa_dist.evaluate.probe_result import Estimate, ImageScores, ProbeResult
from frepa_dist.evaluate.report import add_curves, build_report
from shards.support.errors import DataError
from shards.support.page import Page

PROBE = ProbeResult(
    encoder="an <encoder>",
    images="images",
    label_column=None,
    classes=["a", "b"],
    num_train=[9, 8],
    num_test=[3, 2],
    num_left_out=0,
    split="made",
    resampled="images",
    head="logistic",
    chosen={"C": 0.1},
    at_edge=False,
    inner_auroc=0.7,
    measures={
        "auroc": Estimate(value=0.8125, low=0.61, high=0.95),
        "accuracy": Estimate(value=0.75, low=0.5, high=1.0),
    },
    test=ImageScores(names=["a.png"], y=[1], groups=None, scores=[[0.0, 1.0]]),
    num_resamples=1000,
    seed=0,
    smoke_test=False,
).as_json()
CKA = CkaResult(
    encoder="an encoder",
    images="shards",
    config=CkaConfig(num=7, keep=0.25, cutoff_cycles=13.4, batch_size=7, seed=0),
    rows=[
        CkaRow(modality="fundus", variant="HF tokens only (25%)", num_images=7, cka=-0.1, error=0.2),
        CkaRow(modality="oct", variant="HF tokens only (25%)", num_images=4, cka=0.5, error=None),
    ],
).as_json()
SECTIONS = [
    "Summary",
    "Loss curves",
    "Reconstructions",
    "High-frequency tokens",
    "Similarity to the full image (CKA)",
    "Probe",
    "Time by phase",
    "Configuration",
    "Where things are",
]


def written(run_dir, **kwargs):
    build_report(run_dir, run_dir / "report.html", **kwargs)
    return (run_dir / "report.html").read_text(encoding="utf-8")


def headings(text):
    return re.findall(r"<h2[^>]*>([^<]*)</h2>", text)


def test_a_whole_run(run_dir):
    text = written(run_dir, probe=PROBE, cka=CKA, notes=["Look & see"])
    assert headings(text) == SECTIONS
    assert "Look &amp; see" in text
    assert "12 steps of 4 images: 48 images seen" in text
    assert text.count('alt="75% of 16-pixel patches hidden"') == 6
    assert text.count('alt="before: error ') == text.count('alt="after: error ') == 6
    assert text.count('aria-label="power spectra"') == 6
    assert "Patches are predicted normalized one by one" in text
    assert "ViT tiny, 16-pixel cells, 64-pixel views" in text
    assert "fundus, n = 7 images" in text
    assert "oct, n = 4 images" in text
    assert "an &lt;encoder&gt;" in text
    assert "0.812" in text
    assert "0.812 [0.610, 0.950]" in text
    assert "balanced accuracy" not in text
    assert "0.750 [0.500, 1.000]" in text
    assert "logistic C = 0.1" in text
    assert "image_size: 64" in text
    assert "step-00000012/student.safetensors" in text
    assert "smoke test" not in text
    assert 'http-equiv="refresh"' not in text


def test_time_by_phase_leaves_the_first_line_out_and_names_the_rest(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines[0]["time/data"] = 99.0
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", written(run_dir))
    rest = cells[cells.index("data") :]
    assert rest[:9] == ["data", "0.1", "20.0%", "forward", "0.3", "60.0%", "other", "0.1", "20.0%"]


def test_a_smoke_test_is_called_one_and_several_probes_are_shown(run_dir):
    text = written(run_dir, probe=[PROBE, {**PROBE, "encoder": "another", "smoke_test": True}])
    assert "smoke test" in text
    assert "another" in text


def test_the_same_run_gives_the_same_page(run_dir):
    assert written(run_dir, cka=CKA) == written(run_dir, cka=CKA)


@pytest.mark.parametrize("acted", [False, True])
def test_guards_are_drawn_where_they_acted(acted):
    page = Page("curves")
    values = {"lr/opponent": 2.0, "guard/skipped": float(acted), "guard/spikes": 0.0}
    add_curves(page, [{"step": 1, "loss": 1.0, "lr": 1.0, **values}])
    text = page.render()
    assert ("No guard acted" in text) is not acted
    assert ("guard/skipped" in text) is acted
    assert "guard/spikes" not in text
    assert "lr/opponent" in text


def test_what_belongs_to_no_group_is_drawn_where_it_was_measured():
    page = Page("curves")
    add_curves(page, [{"step": 1, "epoch": 1, "loss": 1.0, "lr": 1.0, "hf_share": 0.5}])
    text = page.render()
    assert "hf_share" in text
    assert "epoch" not in text


def test_a_run_that_has_only_begun_and_is_watched(run_dir):
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "environment.json").unlink()
    shutil.rmtree(run_dir / "checkpoints")
    text = written(run_dir, refresh_seconds=30)
    assert headings(text) == SECTIONS
    assert '<meta http-equiv="refresh" content="30">' in text
    for sentence in (
        "The run goes on.",
        "Nothing is logged yet.",
        "No reconstructions yet",
        "frepa evaluate cka",
        "frepa evaluate probe",
    ):
        assert sentence in text


def test_a_run_whose_dataset_is_gone(run_dir, tmp_path):
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(re.sub(r"root: .*", f"root: {tmp_path / 'gone'}", config))
    assert "the run&#x27;s dataset cannot be read" in written(run_dir)


def test_what_is_no_result_or_no_run(run_dir, tmp_path):
    with pytest.raises(DataError, match="not a ProbeResult"):
        written(run_dir, probe={"auroc": 1})
    with pytest.raises(DataError, match="not a run folder"):
        build_report(tmp_path / "none", tmp_path / "report.html")
