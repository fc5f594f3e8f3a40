"""The probe: every measure against scikit-learn, transfer, shards, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics

from frepa_dist.evaluate.extract import Extraction, extract
from frepa_dist.evaluate.labeled_set import LabeledSet
from frepa_dist.evaluate.pictures import FilePictures
from frepa_dist.evaluate.probe import judge_features, run_probe
from frepa_dist.evaluate.probe_result import ProbeResult
from frepa_dist.evaluate.scores import macro_auroc
from frepa_dist.evaluate.task import Parts, ProbeTask, read_parts
from shards.builder.build import BuildConfig, build_dataset
from shards.support.errors import ConfigError, DataError
from tests.frepa_dist.evaluate.drawn import draw_labeled

LEVELS = {"dark": 60, "light": 180}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw_labeled(folder, LEVELS)
    return folder


def task(folder, **options):
    return ProbeTask(images=str(folder), labels=folder / "labels.csv", num_resamples=50, **options)


@pytest.fixture(scope="module")
def result(folder, small_encoder):
    return run_probe(small_encoder, task(folder, smoke_test=True), extraction=Extraction(batch_size=5))


def test_run_end_to_end(folder, small_encoder, result):
    assert result.classes == ["dark", "light"]
    assert np.add(result.num_train, result.num_test).tolist() == [12, 12]
    assert result.auroc.value == 1.0
    assert (result.resampled, result.split, result.head) == ("patients", "made", "logistic")
    assert ProbeResult.model_validate(result.as_json()) == result
    assert "smoke test" in result.describe()
    assert result == run_probe(
        small_encoder, task(folder, smoke_test=True), extraction=Extraction(batch_size=5)
    )


def test_scores_of_each_test_image_are_kept_and_no_name_of_a_patient(result):
    assert len(result.test.names) == sum(result.num_test) == len(result.test.scores)
    assert all((name[0] == "l") == bool(k) for name, k in zip(result.test.names, result.test.y, strict=True))
    assert "p-" not in str(result.as_json())
    assert max(np.bincount(result.test.groups)) == 2


def test_all_measures_equal_scikit_learn_and_lie_in_their_intervals(tmp_path, small_encoder):
    # a level apart of which noise hides half, in the order of grades
    levels = {"2": 118, "10": 133, "3": 124}
    draw_labeled(tmp_path, levels, num_patients=10, spread=60)
    found = run_probe(small_encoder, task(tmp_path, are_grades=True), extraction=Extraction(batch_size=64))
    assert found.classes == ["2", "3", "10"]
    scores, y, _ = found.test.arrays()
    told = scores.argmax(axis=1)
    expected = {
        "auroc": metrics.roc_auc_score(y, scores, multi_class="ovr"),
        "auprc": np.mean([metrics.average_precision_score(y == k, scores[:, k]) for k in range(3)]),
        "accuracy": metrics.accuracy_score(y, told),
        "balanced_accuracy": metrics.balanced_accuracy_score(y, told),
        "kappa": metrics.cohen_kappa_score(y, told, weights="quadratic"),
    }
    assert {name: one.value for name, one in found.measures.items()} == pytest.approx(expected)
    for one in found.measures.values():
        assert one.low < one.high
        assert one.low - 0.1 <= one.value <= one.high + 0.1
    draw_labeled(tmp_path / "names", LEVELS, num_patients=3)
    with pytest.raises(ConfigError, match="grades have to be numbers"):
        read_parts(task(tmp_path / "names", are_grades=True))


@pytest.mark.parametrize("head", ["linear", "knn", "finetune"])
def test_every_head_tells_dark_from_light(folder, small_encoder, head):
    training = {"linear": ["epochs=20", "learning_rate=1e-2"], "finetune": ["epochs=3", "batch_size=8"]}
    found = run_probe(small_encoder, task(folder), head=head, train=training.get(head, []))
    assert found.auroc.value > 0.95
    assert found.head == head
    assert ProbeResult.model_validate(found.as_json()) == found


def test_transfer_learns_from_one_set_and_is_judged_on_all_of_another(folder, tmp_path, small_encoder):
    part = {0: "test"}
    draw_labeled(tmp_path, LEVELS, seed=1, split=lambda patient: part.get(patient, "train"))
    both = task(folder, transfer=str(tmp_path), transfer_labels=tmp_path / "labels.csv")
    found = run_probe(small_encoder, both)
    assert (found.num_train, found.num_test, found.split) == ([12, 12], [12, 12], "transfer")
    assert found.transfer.images == str(tmp_path)
    assert found.auroc.value > 0.9
    # of a set with a split, the training part is learned from
    back = task(tmp_path, transfer=str(folder), transfer_labels=folder / "labels.csv")
    assert read_parts(back).train.counts(read_parts(back).is_train) == [10, 10]


def test_transfer_that_makes_no_sense_is_refused(folder, tmp_path):
    draw_labeled(tmp_path / "three", LEVELS | {"grey": 120}, seed=2)
    three = {"transfer": str(tmp_path / "three"), "transfer_labels": tmp_path / "three" / "labels.csv"}
    with pytest.raises(DataError, match=r"classes are dark, grey, light, those learned dark, light"):
        read_parts(task(folder, **three))
    read_parts(task(folder, classes=("dark", "light"), **three))
    with pytest.raises(DataError, match="24 pictures are in both sets"):
        read_parts(task(folder, transfer=str(folder), transfer_labels=folder / "labels.csv"))
    with pytest.raises(ConfigError, match="labels without images"):
        read_parts(task(folder, transfer_labels=folder / "labels.csv"))


def test_a_dataset_of_shards_gives_what_its_files_give(folder, tmp_path, small_encoder):
    config = BuildConfig(modality="fundus", size=64, min_side=16, jobs=1, labels=str(folder / "labels.csv"))
    build_dataset([folder], tmp_path / "shards", config)
    shards = ProbeTask(images=str(tmp_path / "shards"), num_resamples=50)
    parts = read_parts(shards)
    assert parts.train.counts() == [12, 12]
    assert len(np.unique(parts.train.groups)) == 12
    files = read_parts(task(folder)).train
    found, known = (
        sorted(map(tuple, extract(small_encoder, one.pictures).tolist())) for one in (parts.train, files)
    )
    np.testing.assert_allclose(found, known, atol=1e-5)
    found = run_probe(small_encoder, shards)
    assert found.auroc.value == 1.0
    assert found.resampled == "patients"
    assert found.label_column == "label"
    with pytest.raises(ConfigError, match="has its labels in its index"):
        read_parts(task(tmp_path / "shards").model_copy(update={"labels": folder / "labels.csv"}))
    with pytest.raises(DataError, match=r"two classes or more of 'grade'.*label"):
        read_parts(ProbeTask(images=str(tmp_path / "shards"), label_column="grade"))


def test_settings_of_a_head_that_has_none_are_refused(folder, small_encoder):
    with pytest.raises(ConfigError, match="not trained by steps"):
        run_probe(small_encoder, task(folder), train=["epochs=3"])
    with pytest.raises(ConfigError, match="unknown key 'epoch'"):
        run_probe(small_encoder, task(folder), head="linear", train=["epoch=3"])
    with pytest.raises(ConfigError, match="no features to keep"):
        run_probe(small_encoder, task(folder), head="finetune", extraction=Extraction(num_ranks=2))


def test_an_unreadable_image_is_named(folder, tmp_path, small_encoder):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            (tmp_path / name / f"{number}.png").write_bytes((folder / "dark0.png").read_bytes())
    (tmp_path / "b" / "3.png").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"b/3\.png"):
        run_probe(small_encoder, ProbeTask(images=str(tmp_path)))


def test_a_head_that_saw_the_test_part_would_be_found_out():
    """Labels mean nothing here, and a wide head could learn them by heart."""
    found = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        names = [f"{number}.png" for number in range(80)]
        y = rng.permutation(np.arange(80) % 2)
        data = LabeledSet(FilePictures(Path(), names), ["a", "b"], y, None, None, 0, None, "here")
        is_test = np.arange(80) % 2 == 0
        parts = Parts(data, ~is_test, data, is_test, "given")
        x = rng.normal(size=(80, 200))
        found.append(
            macro_auroc(judge_features("logistic", x, x, parts, seed, silent=True).scores, y[is_test])
        )
    assert np.mean(found) == pytest.approx(0.5, abs=0.15)
