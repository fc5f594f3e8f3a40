"""The probe: every measure against scikit-learn, transfer, shards, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics

from frepa_dist.evaluate.extract import Extraction, extract
from frepa_dist.evaluate.grouping import group_samples
from frepa_dist.evaluate.labeled_set import LabeledSet
from frepa_dist.evaluate.pictures import FilePictures, Repeat, ShardPictures
from frepa_dist.evaluate.probe import judge_features, run_probe
from frepa_dist.evaluate.probe_result import ProbeResult
from frepa_dist.evaluate.scores import macro_auroc
from frepa_dist.evaluate.task import Parts, ProbeTask, read_parts
from shards.builder.build import BuildConfig, build_dataset
from shards.dataset import load_snapshot
from shards.read.volumes import list_volumes
from shards.support.errors import ConfigError, DataError
from tests.frepa_dist.evaluate.drawn import draw_labeled
from tools.volume_tasks import write_bead_volumes

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


@pytest.mark.parametrize("patients", ["none", "some", "all"])
def test_slices_of_a_volume_are_on_one_side_and_drawn_together(tmp_path, patients):
    labels = Path(write_bead_volumes(tmp_path / "source", 16))
    header, *rows = (line.split(",") for line in labels.read_text().split())
    kept = {"none": 0, "some": 8, "all": 16}[patients]
    for number, row in enumerate(rows):
        row[header.index("patient")] = f"p{number // 2}" if number < kept else ""
    labels.write_text("\n".join(",".join(row) for row in [header, *rows]) + "\n")
    config = BuildConfig(modality="mri", size=32, min_side=32, labels=str(labels), jobs=1)
    build_dataset([tmp_path / "source"], tmp_path / "root", config)
    volumes = list_volumes(tmp_path / "root", load_snapshot(tmp_path / "root"))
    volume_of = {
        place: volume.group
        for volume in volumes
        for place in zip(volume.shards.tolist(), volume.rows.tolist(), strict=True)
    }
    parts = read_parts(ProbeTask(images=str(tmp_path / "root")))
    found = [volume_of[place] for place in parts.train.pictures.places]
    pairs = set(zip(found, parts.train.groups.tolist(), strict=True))
    assert len(pairs) == len(set(found)) == 16 - kept // 2
    assert len(found) == 16 * 8
    assert not set(parts.groups) & set(parts.test_groups)
    expected = {"none": "volumes", "some": "patients and volumes", "all": "patients"}
    assert parts.train.units == expected[patients]


def test_samples_whose_repeat_names_a_patient_are_one_group():
    repeats = [Repeat("a", "p", None), Repeat("b", None, "v")]
    names, patients, volumes = list("abcde"), [None, None, "p", None, None], [None, None, None, "v", None]
    pictures = ShardPictures(None, names, [], [], [], patients, volumes, repeats)
    units, groups = group_samples(pictures, range(5))
    assert units == "patients and volumes"
    assert (groups[0] == groups[2], groups[1] == groups[3], len(set(groups))) == (True, True, 3)
    assert group_samples(pictures, [0, 1, 4]) == ("images", None)
    only_repeats = [Repeat("a", "p", None), Repeat("b", "p", None)]
    pictures = ShardPictures(None, names, [], [], [], [None] * 5, [None] * 5, only_repeats)
    _, groups = group_samples(pictures, range(5))
    assert (groups[0] == groups[1], len(set(groups))) == (True, 4)


def test_equal_files_are_on_one_side_of_a_split(folder, tmp_path):
    rows = []
    for tone in LEVELS:
        for number in range(12):
            shutil.copy(folder / f"{tone}{number % 6}.png", tmp_path / f"{tone}{number}.png")
            rows.append([f"{tone}{number}.png", tone, "test" if number < 2 else "train"])
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["filename,label", *(",".join(row[:2]) for row in rows)]))
    made = ProbeTask(images=str(tmp_path), labels=table)
    parts = read_parts(made)
    digests = np.array(parts.train.pictures.digests())
    assert not set(digests[parts.is_train]) & set(digests[parts.is_test])
    assert (len(np.unique(parts.train.groups)), parts.train.units) == (12, "images")
    table.write_text("\n".join(["filename,label,split", *map(",".join, rows)]))
    with pytest.raises(DataError, match=r"4 pictures of the test part.*dark0\.png \(dark6\.png there"):
        read_parts(made)


def test_files_that_lie_elsewhere_are_called_by_their_whole_path(folder, tmp_path):
    rows = [f"{folder / f'{tone}{n}.png'},{tone}" for tone in LEVELS for n in range(4)]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["filename,label", *rows]))
    pictures = read_parts(ProbeTask(images=str(tmp_path), labels=table)).train.pictures
    assert pictures.names[0] == str(folder / "dark0.png")
    assert pictures.pixels([0, 7], 16).shape == (2, 3, 16, 16)


def test_settings_of_a_head_that_has_none_are_refused(folder, small_encoder):
    with pytest.raises(ConfigError, match="not trained by steps"):
        run_probe(small_encoder, task(folder), train=["epochs=3"])
    with pytest.raises(ConfigError, match="unknown key 'epoch'"):
        run_probe(small_encoder, task(folder), head="linear", train=["epoch=3"])
    with pytest.raises(ConfigError, match="no features to keep"):
        run_probe(small_encoder, task(folder), head="finetune", extraction=Extraction(num_ranks=2))


def test_an_unreadable_image_is_named(folder, tmp_path, small_encoder):
    for name, tone in (("a", "dark"), ("b", "light")):
        (tmp_path / name).mkdir()
        for number in range(4):
            shutil.copy(folder / f"{tone}{number}.png", tmp_path / name / f"{number}.png")
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
