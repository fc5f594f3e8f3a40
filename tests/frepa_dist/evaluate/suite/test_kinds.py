"""Every kind of task in a suite: what is read from a result is what its test images say."""

from __future__ import annotations

import pytest

from frepa_dist.evaluate.reconstruct import (
    ReconstructionResult,
    ReconstructionRow,
    ReconstructionSettings,
    Spread,
)
from frepa_dist.evaluate.suite.config import SuiteConfig
from frepa_dist.evaluate.suite.kinds import RUNNERS
from frepa_dist.evaluate.suite.page import write_report
from frepa_dist.evaluate.suite.readings import read_reconstruct
from frepa_dist.evaluate.suite.run import Place, run_suite
from frepa_dist.evaluate.suite.sections import PICTURES
from frepa_dist.evaluate.suite.summary import summarize
from frepa_dist.evaluate.suite.tables import write_tables
from shards.builder.build import BuildConfig, build_dataset
from tests.frepa_dist.evaluate.drawn import draw_labeled, draw_masked
from tools.volume_tasks import write_bead_volumes

MAIN = {
    "probe": "AUROC",
    "label-curve": "AUROC, 40% of the labels",
    "tokens": "AUROC, HF tokens only (25%)",
    "segment": "Dice",
    "detect": "lesions found, mean over images",
    "restore": "PSNR, dB",
    "high-pass": "AUROC, mean of high-passed",
    "cka": "CKA, high-passed image",
    "layer-cka": "CKA of the output, band above 8",
    "token-pca": "variance in three components",
    "layer-spectra": "log-amplitude at the highest frequency",
    "volume": "AUROC",
}


@pytest.fixture(scope="module")
def suite(small_encoder, tmp_path_factory):
    """One encoder on one task of each kind."""
    labeled, masked = tmp_path_factory.mktemp("labeled"), tmp_path_factory.mktemp("masked")
    table = draw_labeled(labeled, {"a": 100, "b": 110}, num_patients=6)
    draw_masked(masked, num=6)
    probe = {"images": str(labeled), "labels": str(table), "modality": "fundus"}
    masks = {"images": str(masked), "masks": str(masked / "labels.csv")}
    training = {"epochs": 1, "max_tiles": 1, "head_width": 8}
    tasks = {
        "probe": {**probe, "head": "linear", "training": {"epochs": 2, "learning_rate": 0.01}},
        "label-curve": {**probe, "shares": [0.4, 1], "num_draws": 2},
        "tokens": probe,
        "high-pass": {**probe, "cutoffs": [0, 4, 8]},
        "segment": {**masks, "training": training},
        "detect": {**masks, "training": training, "count": {"min_distance": 3}},
        "restore": {"images": str(masked), "labels": masks["masks"], "training": training},
        "cka": {"images": str(labeled), "modality": "fundus", "config": {"num": 8}},
        "layer-cka": {"images": str(labeled), "config": {"num": 8, "edges": [4, 8]}},
        "layer-spectra": {"images": str(labeled), "config": {"num": 4}},
        "token-pca": {"images": str(labeled), "config": {"num": 4}},
    }
    volumes = tmp_path_factory.mktemp("volumes")
    labels = write_bead_volumes(volumes / "source", 8)
    build = BuildConfig(modality="mri", size=32, min_side=32, labels=labels, jobs=1)
    build_dataset([volumes / "source"], volumes / "root", build)
    small = {"width": 16, "depth": 2, "num_heads": 2, "num_slices": 4, "overlap": 2}
    tasks["volume"] = {"images": str(volumes / "root"), "head": small, "training": {"epochs": 1}}
    config = SuiteConfig.model_validate(
        {
            "output": str(tmp_path_factory.mktemp("suite")),
            "device": "cpu",
            "num_resamples": 10,
            "num_permutations": 9,
            "num_pictures": 1,
            "encoders": [{"name": "one", "sources": [small_encoder]}],
            "tasks": [{"kind": kind, "name": kind, **given} for kind, given in tasks.items()],
        }
    )
    return config, run_suite(config)


def test_all_kinds_run(suite):
    config, results = suite
    assert results.failures == {}
    assert results.exit_code == 0
    assert {task.kind for task in config.tasks} == set(RUNNERS) - {"reconstruct"}  # which needs a run


@pytest.mark.parametrize("kind", list(MAIN))
def test_test_images_make_the_measure(suite, kind):
    reading = suite[1].readings[Place(kind, "one", 0)]
    assert reading.main == MAIN[kind]
    told = {name: measured for name, measured in reading.measures.items() if measured.panel is not None}
    assert (reading.main in told) == (kind not in ("cka", "layer-cka", "token-pca"))  # of all images together
    for name, measured in told.items():
        assert measured.panel.by_seed() == pytest.approx([measured.value]), name
        if measured.low is not None:
            assert measured.low - 1e-9 <= measured.value <= measured.high + 1e-9, name
    learns_nothing = kind in ("cka", "layer-cka", "layer-spectra", "token-pca")
    assert (reading.leakage is None) == learns_nothing
    assert (reading.measures[reading.main].is_up is None) == learns_nothing
    assert {name for name, measured in reading.measures.items() if measured.is_up is False} <= {"RMSE"}
    assert kind != "restore" or reading.measures["RMSE"].is_up is False
    patients = kind in ("probe", "label-curve", "tokens", "high-pass", "volume")
    assert reading.unit == ("patients" if patients else "images")


def test_the_page_shows_all_of_them(suite):
    config, results = suite
    summary = summarize(config, results)
    write_tables(config, results, summary)
    write_report(config, results, summary)
    page = (config.output / "report.html").read_text()
    for kind in MAIN:
        assert f'<h2 id="{kind}">' in page
        assert bool(results.cells[Place(kind, "one", 0)].pictures) == (kind in PICTURES)
    # image and overlay, image and heat, degraded, clean and restored, image and colors
    assert page.count("<img") == 2 + 2 + 3 + 2
    assert "One seed of one: nothing is known of the spread of its training" in page
    assert "Differences to" not in page  # a single encoder
    assert not any(task.best for task in summary.tasks)


def row(corruption: str, errors: list[float | None], *, common: bool, note: str = "") -> ReconstructionRow:
    mean = Spread.of([value for value in errors if value is not None])
    return ReconstructionRow(
        modality="fundus",
        corruption=corruption,
        common=common,
        num_images=len(errors),
        absolute=mean,
        relative=mean,
        high_band=mean,
        power_kept=mean,
        by_image={"high_band": errors},
        note=note,
    )


def test_reconstructions_are_compared_by_what_was_hidden():
    own = row("tiles of noise", [0.5, 0.7], common=False)
    patches = row("75% of 16-pixel patches hidden", [0.2, None, 0.4], common=True)
    borrowed = row("75% of 16-pixel patches hidden", [0.9, 0.9], common=False, note="normalized")
    result = ReconstructionResult(
        run="run",
        step=1,
        method="frepa",
        images="images",
        config=ReconstructionSettings(num=3, seed=0),
        rows=[own, patches, borrowed],
    )
    reading = read_reconstruct(result)
    assert list(reading.measures) == [
        "error of detail, 75% of 16-pixel patches hidden",
        "error of detail, tiles of noise",
        "error of detail, 75% of 16-pixel patches hidden, tone from the image",
    ]
    for measured in reading.measures.values():
        assert measured.is_up is False
        assert measured.panel.by_seed() == pytest.approx([measured.value])
    assert reading.measures[reading.main].value == pytest.approx(0.3)
