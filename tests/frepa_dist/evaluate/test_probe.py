"""The probe: its AUROC against scikit-learn's, its splits, and what it refuses."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from frepa_dist.evaluate import probe
from frepa_dist.evaluate.labelled import LabeledImages
from frepa_dist.evaluate.probe import (
    ProbeResult,
    choose_c,
    fit,
    run_probe,
    split_parts,
    stratified_folds,
)
from frepa_dist.evaluate.scores import macro_auroc
from shards.support.errors import DataError


def blobs(num_per_class, num_classes=2, width=8, distance=2.0, seed=0):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(num_classes), num_per_class)
    x = rng.normal(size=(len(y), width))
    x[np.arange(len(y)), y] += distance
    return x, y


def test_macro_auroc_equals_scikit_learn_and_of_two_classes_the_plain_one():
    x, y = blobs(30, num_classes=4)
    scores = fit(x, y, 0.1).scores(x)
    assert macro_auroc(scores, y) == pytest.approx(roc_auc_score(y, scores, multi_class="ovr"))
    x, y = blobs(30)
    scores = fit(x, y, 0.1).scores(x)
    assert macro_auroc(scores, y) == pytest.approx(roc_auc_score(y, scores[:, 1]))


def test_no_warning_reaches_the_user(monkeypatch):
    monkeypatch.setattr(probe, "MAX_ITERATIONS", 1)
    x, y = blobs(40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_c(x, y, None, 0)


def test_penalty_is_chosen_by_the_training_part_and_noise_wants_a_strong_one():
    x, y = blobs(40, width=200, distance=1.5)
    c, inner = choose_c(x, y, None, 0)
    assert c < 1
    assert 0.6 < inner < 1


def test_folds_are_stratified_and_keep_patients_together():
    y = np.repeat([0, 1, 2], [40, 20, 10])
    groups = np.arange(70) // 2
    folds = stratified_folds(y, groups, 5, seed=0)
    assert len(folds) == 5
    for train, test in folds:
        assert not set(groups[train]) & set(groups[test])
        assert set(y[train]) == set(y[test]) == {0, 1, 2}
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(70))
    assert stratified_folds(np.array([0, 0, 1]), None, 5, seed=0) == []


def labeled(y, splits=None):
    return LabeledImages([], [str(k) for k in y], splits, None, 0)


def test_a_split_that_is_made_is_stratified_seeded_and_by_patient():
    y = np.repeat([0, 1], [60, 20])
    made = split_parts(labeled(y), y, None, 0, "here")
    assert np.bincount(y[made]).tolist() == [15, 5]
    np.testing.assert_array_equal(made, split_parts(labeled(y), y, None, 0, "here"))
    assert (made != split_parts(labeled(y), y, None, 1, "here")).any()
    groups = np.arange(80) // 2
    by_patient = split_parts(labeled(y), y, groups, 0, "here")
    assert not set(groups[by_patient]) & set(groups[~by_patient])


def test_splits_that_cannot_be_used():
    y = np.array([0, 0, 0, 1])
    with pytest.raises(DataError, match=r"too few.*0 3, 1 1"):
        split_parts(labeled(y), y, None, 0, "here")
    y = np.array([0, 0, 0, 1, 1])
    with pytest.raises(DataError, match="too few"):
        split_parts(labeled(y, ["train", "train", "test", "train", "train"]), y, None, 0, "here")
    y = np.array([0, 0, 0, 1, 1, 1])
    splits = ["train", "train", "test"] * 2
    with pytest.raises(DataError, match="one patient on both sides"):
        split_parts(labeled(y, splits), y, np.array([0, 1, 1, 2, 3, 4]), 0, "here")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 180)):
        (folder / name).mkdir()
        for number in range(12):
            pixels = np.clip(rng.normal(level, 25, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def test_run_end_to_end(images, small_encoder):
    result = run_probe(small_encoder, images, num_resamples=50, batch_size=5, smoke_test=True)
    assert (result.classes, result.num_train, result.num_test) == (["dark", "light"], [9, 9], [3, 3])
    assert result.auroc == 1.0
    assert result.low <= result.auroc <= result.high
    assert ProbeResult.model_validate(result.as_json()) == result
    assert "smoke test" in result.describe()
    assert result == run_probe(small_encoder, images, num_resamples=50, batch_size=5, smoke_test=True)


def test_an_unreadable_image_is_named(images, tmp_path, small_encoder):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            (tmp_path / name / f"{number}.png").write_bytes((images / "dark" / "0.png").read_bytes())
    (tmp_path / "b" / "3.png").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"b/3\.png"):
        run_probe(small_encoder, tmp_path)
