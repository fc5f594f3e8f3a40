"""An evaluation on images of the pretraining is refused before any figure, or says that it was allowed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from frepa_dist.evaluate import leakage
from frepa_dist.evaluate.leakage import check_leakage
from frepa_dist.evaluate.pictures import open_shards
from frepa_dist.export import export_encoder
from frepa_dist.runs import load_run_config
from shards.audit import leakage as audit
from shards.audit import stored
from shards.audit.stored import read_samples
from shards.builder.build import BuildConfig, build_dataset
from shards.dataset import load_snapshot
from shards.stores.store import open_store
from shards.support.errors import DataError
from shards.support.settings import dump_yaml
from tests.commands import frepa


@pytest.fixture(scope="module")
def labeled(small_dataset, tmp_path_factory):
    """Eight images in two classes, of which one is in the dataset."""
    folder = tmp_path_factory.mktemp("labeled")
    rng = np.random.default_rng(9)
    shard = load_snapshot(small_dataset).shards[0]
    ((_, seen),) = read_samples(open_store(small_dataset), shard, np.array([0]))
    for label in ("a", "b"):
        (folder / label).mkdir()
        for number in range(4):
            coarse = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8))
            coarse.resize((90, 72)).save(folder / label / f"{number}.png")
    Image.fromarray(seen).save(folder / "a" / "2.png")
    for name, split in (("tested", "test"), ("learned", "train")):
        rows = [
            f"{path.relative_to(folder)},{path.parent.name},{'test' if path.stem == '3' else 'train'}"
            for path in files_of(folder)
        ]
        rows = [row.replace("train", split) if row.startswith("a/2") else row for row in rows]
        (folder / f"{name}.csv").write_text("\n".join(["filename,label,split", *rows, ""]))
    return folder


def files_of(folder):
    return sorted(folder.glob("*/*.png"))


def test_a_probe_is_refused_unless_leakage_is_allowed(run_dir, labeled, tmp_path):
    refused = frepa("evaluate", "probe", run_dir, labeled, "--labels", labeled / "tested.csv")
    assert refused.returncode == 3
    assert "1 of 8 files found" in refused.stderr
    assert "a/2.png" not in refused.stderr  # it goes onto pages, and may name a patient
    assert "`frepa evaluate leakage` lists them" in refused.stderr
    assert "AUROC" not in refused.stdout
    out = tmp_path / "probe.json"
    table = ("--labels", labeled / "tested.csv")
    allowed = frepa("evaluate", "probe", run_dir, labeled, *table, "--allow-leakage", "--out", out)
    assert allowed.returncode == 0, allowed.stderr
    assert "same pixels 1" in json.loads(out.read_text())["leakage"]
    assert "of the test part 1 of 3 files, which was allowed" in allowed.stdout


def test_samples_of_another_dataset_are_looked_for(run_dir, labeled, tmp_path):
    settings = BuildConfig(modality="dermoscopy", size=64, labels=str(labeled / "tested.csv"), jobs=1)
    build_dataset([labeled], tmp_path / "root", settings)
    refused = frepa("evaluate", "probe", run_dir, tmp_path / "root")
    assert refused.returncode == 3
    assert "of the test part 1 of 3 samples" in refused.stderr  # 72 pixels there, 64 here: a near duplicate
    allowed = frepa("evaluate", "probe", run_dir, tmp_path / "root", "--allow-leakage")
    assert allowed.returncode == 0, allowed.stderr
    searched = frepa("evaluate", "leakage", run_dir, tmp_path / "root")
    assert searched.returncode == 3
    assert "1 of 8 samples found among 7 pretraining samples" in searched.stdout
    page = frepa("evaluate", "leakage", run_dir, tmp_path / "root", "--page", tmp_path / "page.html")
    assert (page.returncode, "name a folder of files" in page.stderr) == (2, True)


def test_samples_are_looked_for_in_blocks_and_damaged_ones_are_told(small_dataset, tmp_path, monkeypatch):
    copy = shutil.copytree(small_dataset, tmp_path / "copy")
    monkeypatch.setattr(stored, "MOST_AT_ONCE", 3)
    monkeypatch.setattr(audit, "MOST_AT_ONCE", 3)
    report = audit.find_leakage(small_dataset, open_shards(copy).stored(), jobs=1)
    assert (report.num_files, len(report.files), report.unreadable) == (7, 7, {})
    (shard,) = load_snapshot(copy).shards
    with (copy / shard.path).open("r+b") as file:
        file.seek(600)  # in the first member, behind its header
        file.write(b"damaged")
    report = audit.find_leakage(small_dataset, open_shards(copy).stored(), jobs=1)
    assert (len(report.files), len(report.unreadable)) == (6, 1)
    assert "6 of 7 samples found" in report.summary()
    assert "1 samples unreadable" in report.summary()


def test_an_image_of_the_training_part_is_said_and_not_refused(run_dir, labeled):
    ended = frepa("evaluate", "probe", run_dir, labeled, "--labels", labeled / "learned.csv")
    assert ended.returncode == 0, ended.stderr
    assert "same pixels 1" in ended.stdout
    assert "of the test part 0 of 2 files" in ended.stdout
    assert "allowed" not in ended.stdout


def test_other_images_pass_and_are_searched_once(run_dir, labeled, tmp_path, monkeypatch):
    shutil.copytree(labeled / "b", tmp_path / "b")
    files = files_of(tmp_path)
    said = check_leakage(run_dir, files, images=tmp_path)
    assert said.startswith("none of 4 files found among 7 pretraining samples")
    monkeypatch.setattr(leakage, "find_leakage", lambda *_, **__: pytest.fail("searched again"))
    assert check_leakage(run_dir, files, images=tmp_path) == said
    other = shutil.copytree(run_dir, tmp_path / "other", ignore=shutil.ignore_patterns(leakage.FOLDER))
    assert check_leakage(other, files, images=tmp_path) == said  # of the same data
    monkeypatch.setattr(leakage, "_SEARCHED", {})
    assert check_leakage(other, files, images=tmp_path) == said  # another day
    monkeypatch.setattr(leakage, "load_snapshot", lambda *_: pytest.fail("the dataset may be gone by then"))
    assert check_leakage(other, files, images=tmp_path) == said
    Image.new("RGB", (90, 72)).save(files[0])  # another image under a known name
    with pytest.raises(pytest.fail.Exception):
        check_leakage(run_dir, files, images=tmp_path)


def test_what_was_found_under_other_names_is_searched_again(run_dir, labeled):
    files = files_of(labeled)
    for images in (labeled / "a", labeled, labeled.parent):
        with pytest.raises(DataError, match="1 of 8 files found"):
            check_leakage(run_dir, files, images=images)


def test_a_modality_that_a_run_leaves_out_is_none_of_its_pretraining_images(run_dir, labeled, tmp_path):
    root = load_run_config(run_dir).data.root
    (tmp_path / "more").mkdir()
    for number in range(3):
        Image.effect_noise((90, 72), 50 + number).save(tmp_path / "more" / f"{number}.png")
    grown = shutil.copytree(root, tmp_path / "shards")
    build_dataset([tmp_path / "more"], grown, BuildConfig(modality="dermoscopy", size=72, jobs=1))
    changed = yaml.safe_load((run_dir / "config.yaml").read_text())
    changed["data"] |= {"root": str(grown), "snapshot": load_snapshot(grown).hash}
    (run_dir / "config.yaml").write_text(dump_yaml(changed))
    assert "same pixels 1" in check_leakage(run_dir, files_of(labeled), images=labeled, allow=True)
    changed["data"]["modality_weights"] = {"histopathology": 0}
    (run_dir / "config.yaml").write_text(dump_yaml(changed))
    said = check_leakage(run_dir, files_of(labeled), images=labeled)
    assert said.startswith("none of 8 files found among 3 pretraining samples")
    clean = frepa("evaluate", "leakage", run_dir, labeled)
    assert clean.returncode == 0, clean.stderr
    asked = frepa("evaluate", "leakage", run_dir, labeled, "--modality", "histopathology")
    assert asked.returncode == 3
    card = (export_encoder(run_dir, tmp_path / "encoder") / "README.md").read_text()
    assert "Nothing was drawn of its histopathology." in card
    assert "| dermoscopy | " in card
    assert "| histopathology | " not in card


def test_what_cannot_be_checked_is_said(run_dir, labeled, small_encoder, monkeypatch):
    monkeypatch.setattr(leakage, "_SEARCHED", {})
    said = check_leakage(small_encoder, files_of(labeled), images=labeled)
    assert said.startswith("not checked: the encoder is no run folder")
    config = (run_dir / "config.yaml").read_text()
    root = next(line for line in config.splitlines() if line.strip().startswith("root:"))
    (run_dir / "config.yaml").write_text(config.replace(root, "  root: nowhere"))
    said = check_leakage(run_dir, files_of(labeled), images=labeled)
    assert said.startswith("not checked: the dataset of the run cannot be searched (")


def test_the_command_tells_pairs_and_ends_with_code_3(run_dir, labeled, tmp_path):
    page, out = tmp_path / "page.html", tmp_path / "found.json"
    found = frepa("evaluate", "leakage", run_dir, labeled, "--page", page, "--out", out)
    assert found.returncode == 3
    assert "same pixels" in found.stdout
    assert json.loads(out.read_text())["found"][0]["file"] == "a/2.png"
    assert page.read_text().count("data:image/png") == 2
    table = tmp_path / "labels.csv"
    table.write_text("filename,patient\nb/0.png,p1\n")
    clean = frepa("evaluate", "leakage", run_dir, labeled, "--labels", table)
    assert clean.returncode == 0, clean.stderr
    assert frepa("evaluate", "leakage", run_dir, labeled, "--allow-leakage").returncode == 0
    table.write_text("name\nb/0.png\n")
    assert "filename" in frepa("evaluate", "leakage", run_dir, labeled, "--labels", table).stderr


@pytest.mark.parametrize("command", ["label-curve", "tokens", "high-pass", "restore", "detect"])
def test_every_task_on_labels_or_files_is_refused(command, run_dir, labeled):
    table = ("--masks" if command == "detect" else "--labels", labeled / "tested.csv")
    more = {"tokens": ("--modality", "histopathology"), "detect": ("--mask-column", "filename")}
    refused = frepa("evaluate", command, run_dir, labeled, *table, *more.get(command, ()))
    assert refused.returncode == 3, refused.stderr
    assert "1 of 8 files found" in refused.stderr
    assert refused.stdout == ""
    assert "features:" not in refused.stderr  # before anything was computed
    assert "encode:" not in refused.stderr


def test_a_suite_refuses_one_result_and_says_the_others(run_dir, labeled, small_encoder, tmp_path):
    probe = {"kind": "probe", "images": str(labeled), "num_resamples": 5}
    config = {
        "output": str(tmp_path / "out"),
        "device": "cpu",
        "encoders": [
            {"name": "run", "sources": [str(run_dir)]},
            {"name": "file", "sources": [small_encoder]},
        ],
        "tasks": [
            {**probe, "name": "tested", "labels": str(labeled / "tested.csv"), "modality": "fundus"},
            {**probe, "name": "learned", "labels": str(labeled / "learned.csv")},
        ],
    }
    (tmp_path / "suite.yaml").write_text(dump_yaml(config))
    refused = frepa("evaluate", "suite", tmp_path / "suite.yaml")
    assert refused.returncode == 3, refused.stderr
    assert "3 results computed, 0 known, 1 failed" in refused.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert "of the test part 0 of 2 files" in page
    assert "1 of 8 files found" in page  # why it failed
    assert "not checked: the encoder is no run folder" in page
    found = json.loads((tmp_path / "out" / "suite.json").read_text())
    known = found["pretraining"]["run"]  # the run says what it was trained on
    assert (known["modalities"], known["num_images"]) == (["histopathology"], 7)
    allowed = frepa("evaluate", "suite", tmp_path / "suite.yaml", "--set", "allow_leakage=true")
    assert allowed.returncode == 0, allowed.stderr
    assert "1 results computed, 3 known, 0 failed" in allowed.stdout  # what was had without leave stands
    page = (tmp_path / "out" / "report.html").read_text()
    assert "of the test part 1 of 3 files, which was allowed" in page
    assert "(unseen)" in page
    again = frepa("evaluate", "suite", tmp_path / "suite.yaml")  # what was had with leave does not
    assert again.returncode == 3
    assert "0 results computed, 3 known, 1 failed" in again.stdout
