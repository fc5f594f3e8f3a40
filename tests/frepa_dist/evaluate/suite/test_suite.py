"""A suite from the command line: what is known is not computed again, what fails takes nothing else down."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from frepa_dist.evaluate.suite import run as suite_run
from frepa_dist.evaluate.suite.run import Failure, _attempt
from frepa_dist.evaluate.suite.store import Cell, write_cell
from shards.support.errors import EnvironmentFault
from shards.support.settings import dump_yaml
from tests.commands import frepa
from tests.frepa_dist.evaluate.drawn import draw_labeled, draw_masked


@pytest.fixture(scope="module")
def sources(small_weights, tmp_path_factory):
    """Four encoders: two seeds of each of two ways to pretrain."""
    folder = tmp_path_factory.mktemp("sources")
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        state = {
            name: value + 0.02 * number * torch.randn(value.shape, generator=generator)
            for name, value in small_weights.items()
        }
        save_file(state, folder / f"{number}.safetensors")
    return [str(folder / f"{number}.safetensors") for number in range(4)]


@pytest.fixture(scope="module")
def settings(sources, tmp_path_factory):
    """A suite of three encoders, of which one cannot be loaded and one is another by a second name."""
    labeled, masked = tmp_path_factory.mktemp("labeled"), tmp_path_factory.mktemp("masked")
    draw_labeled(labeled, {"a": 100, "b": 112}, num_patients=8)
    draw_masked(masked)
    return {
        "output": str(tmp_path_factory.mktemp("suite")),
        "title": "Two ways to pretrain",
        "device": "cpu",
        "num_resamples": 30,
        "num_permutations": 99,
        "num_pictures": 1,
        "encoders": [
            {"name": "new", "sources": sources[2:], "pretrained_on": ["fundus"], "family": "ours",
             "pretraining_images": 2000},
            {"name": "plain", "sources": sources[:2], "baseline": True, "pretrained_on": ["ct"],
             "family": "ours", "pretraining_images": 1000},
            {"name": "plain again", "sources": sources[:2]},
            {"name": "lost", "sources": ["nowhere"]},
        ],
        "tasks": [
            {"kind": "probe", "name": "tone", "modality": "fundus", "published": "retmae/idrid",
             "images": str(labeled), "labels": str(labeled / "labels.csv")},
            {"kind": "segment", "name": "blocks", "modality": "fundus", "images": str(masked),
             "masks": str(masked / "labels.csv"),
             "training": {"epochs": 2, "max_tiles": 1, "head_width": 8}},
        ],
    }  # fmt: skip


def run(settings, folder, *options, **changes):
    path = folder / "suite.yaml"
    path.write_text(dump_yaml({**settings, **changes}))
    ended = frepa("evaluate", "suite", path, *options)
    return ended.returncode, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def first(settings, tmp_path_factory):
    """Exit code, what was said, and the values, before other tests start the suite again."""
    code, said = run(settings, tmp_path_factory.mktemp("first"))
    return code, said, list(csv.DictReader(out(settings, "values.csv").splitlines()))


def out(settings, name):
    with open(os.path.join(settings["output"], name), encoding="utf-8") as file:
        return file.read()


def test_all_that_can_be_had_is_had(first, settings):
    code, said, rows = first
    assert code == 2, said  # of the encoder that is not there
    assert "8 results computed, 4 known, 2 failed" in said
    assert sum(row["state"].startswith("nowhere: no encoder is there") for row in rows) == 2
    assert {row["encoder"] for row in rows if row["measure"] == "Dice"} == {"new", "plain", "plain again"}
    page = out(settings, "report.html")
    for words in (
        "Two ways to pretrain", "2 results could not be had", "no encoder is there", "not checked",
        "Differences to plain", "minus plain", "0.816", "published, not measured here", "(unseen)",
        "Modalities left out", "Number of pretraining images", "test image 1", "new: Dice",
        "A source of plain again has the weights of one of plain",
        "How it was measured", "say nothing of what another training",
    ):  # fmt: skip
        assert words in page, words
    assert "image0.png" not in page  # file names may name patients
    assert said.count("no encoder is there") == 2  # when it is found, and in the end
    assert "[14/14] blocks, lost, nowhere: failed" in said
    assert "One seed" not in page  # the only encoder of one seed gave nothing


def test_identical_encoders_differ_in_nothing(first, settings):
    whole = json.loads(out(settings, "suite.json"))
    for task in whole["tasks"]:
        found = {gap["encoder"]: gap for gap in task["contrasts"]}
        same = found["plain again"]
        assert (same["value"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
        assert (same["by_seed"], same["deviation"]) == ([0, 0], 0)
        assert found["new"]["p_holm"] == min(1, 2 * found["new"]["p"])
        assert task["best"] is None
        assert {row["encoder"]: row["is_unseen"] for row in task["rows"]} == {
            "new": False, "plain": True, "plain again": None,
        }  # fmt: skip
    assert [(p["encoder"], p["num_images"]) for p in whole["scaling"][:2]] == [("plain", 1000), ("new", 2000)]
    assert {said["said"].split(":")[0] for said in whole["leakage"]} == {"not checked"}


def test_a_second_start_computes_nothing(first, settings, tmp_path):
    page = out(settings, "report.html")
    code, said = run(settings, tmp_path)
    assert "0 results computed, 12 known, 2 failed" in said
    assert code == 2
    assert out(settings, "report.html") == page
    # nor does another name, or what only the page shows
    (probe, segment), title = settings["tasks"], "Renamed"
    tasks = [{**probe, "name": "tone of images", "published": []}, segment]
    _, said = run(settings, tmp_path, tasks=tasks, title=title)
    assert "0 results computed, 12 known" in said
    assert "published, not" not in out(settings, "report.html")


def test_what_changed_is_computed_alone(first, settings, tmp_path):
    probe, segment = settings["tasks"]
    other = {**segment, "training": {**segment["training"], "epochs": 1}}
    _, said = run(settings, tmp_path, "--only", "tone", tasks=[probe, other])
    assert "0 results computed, 6 known, 1 failed" in said  # the changed task was not asked for
    assert "blocks, new, " in said
    assert "not run" in out(settings, "report.html")
    _, said = run(settings, tmp_path, "--set", "encoders=" + json.dumps(settings["encoders"][:1]),
                  tasks=[probe, other])  # fmt: skip
    assert "2 results computed, 2 known, 0 failed" in said
    code, said = run(settings, tmp_path, "--only", "tones")
    assert (code, "allowed: tone, blocks" in said) == (2, True)


def test_other_images_and_torn_results_are_noticed(first, settings, tmp_path):
    probe, segment = settings["tasks"]
    only = {"encoders": settings["encoders"][:1], "tasks": [probe, segment]}
    (torn,) = [
        os.path.join(settings["output"], "results", name)
        for name in os.listdir(os.path.join(settings["output"], "results"))
        if name.startswith("tone--new-1--")
    ]
    with open(torn, "r+", encoding="utf-8") as file:
        file.truncate(100)
    _, said = run(settings, tmp_path, **only)
    assert "1 results computed, 3 known" in said
    image = os.path.join(probe["images"], "a0.png")
    os.utime(image, (1, 1))
    _, said = run(settings, tmp_path, **only)
    assert "2 results computed, 2 known" in said
    # a mask counts as much, wherever it lies, and an image that no table names does not
    shutil.copy(image, os.path.join(segment["images"], "new.png"))
    with open(segment["masks"], newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    elsewhere = tmp_path / "mask.png"
    shutil.copy(os.path.join(segment["images"], rows[0]["mask"]), elsewhere)
    rows[0]["mask"] = str(elsewhere)
    with open(table := tmp_path / "masks.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    only["tasks"] = [{**segment, "masks": str(table)}]
    assert "2 results computed, 0 known" in run(settings, tmp_path, **only)[1]
    assert "0 results computed, 2 known" in run(settings, tmp_path, **only)[1]
    os.utime(elsewhere, (1, 1))
    assert "2 results computed, 0 known" in run(settings, tmp_path, **only)[1]


def test_results_of_another_version_are_computed_anew(first, settings, tmp_path):
    given = {
        "encoders": settings["encoders"][:1],
        "tasks": settings["tasks"][:1],
        "output": str(tmp_path / "o"),
    }
    shutil.copytree(os.path.join(settings["output"], "results"), tmp_path / "o" / "results")
    assert "0 results computed, 2 known" in run(settings, tmp_path, **given)[1]
    for path in (tmp_path / "o" / "results").glob("tone--new-0--*.json"):
        cell = json.loads(path.read_text())
        del cell["result"]["measures"]
        path.write_text(json.dumps(cell))
    assert "1 results computed, 1 known" in run(settings, tmp_path, **given)[1]


def test_figures_that_are_no_numbers_are_kept(tmp_path):
    cell = Cell(kind="probe", source="s", encoder="e", result={"x": math.nan}, pictures=[], seconds=1)
    write_cell(tmp_path / "cell.json", cell)
    assert math.isnan(Cell.model_validate_json((tmp_path / "cell.json").read_text()).result["x"])


def test_the_same_weights_are_no_other_seed(sources, settings, tmp_path):
    copy = tmp_path / "copy.safetensors"
    shutil.copy(sources[0], copy)
    encoders = [{"name": "a $x^2^3$", "sources": [sources[0], sources[1], str(copy)]}]
    given = {"encoders": encoders, "tasks": settings["tasks"][:1], "output": str(tmp_path / "out")}
    code, said = run(settings, tmp_path, **given)
    assert code == 2
    assert f"{copy}: it has the same weights as {sources[0]}" in said
    assert "2 results computed, 0 known, 1 failed" in said
    assert "a $x^2^3$" in (tmp_path / "out" / "report.html").read_text()


def test_leave_to_leak_changes_nothing_where_nothing_could(first, settings, tmp_path):
    _, said = run(settings, tmp_path, allow_leakage=True, encoders=settings["encoders"][:1])
    assert "0 results computed" in said


def test_stopped_in_the_middle_it_goes_on_and_finds_the_same(first, settings, tmp_path, monkeypatch):
    written = []

    def write(path, cell):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write_cell(path, cell)

    given = {"encoders": settings["encoders"][:1], "output": str(tmp_path / "out")}
    with monkeypatch.context() as patched:
        patched.setattr(suite_run, "write_cell", write)
        code, _ = run(settings, tmp_path, **given)
    assert code == 130
    assert not (tmp_path / "out" / "report.html").exists()
    code, said = run(settings, tmp_path, **given)
    assert (code, "2 results computed, 2 known, 0 failed" in said) == (0, True)
    now = list(csv.DictReader((tmp_path / "out" / "values.csv").open()))
    assert now == [row for row in first[2] if row["encoder"] == "new"]


def test_a_head_that_diverges_is_one_failure(settings, tmp_path):
    probe, segment = settings["tasks"]
    wild = {"epochs": 3, "max_tiles": 1, "head_width": 8, "learning_rate": 1e30, "clip_norm": 1e30}
    code, said = run(
        settings,
        tmp_path,
        tasks=[{**segment, "training": wild}, probe],
        encoders=settings["encoders"][:1],
        output=str(tmp_path / "out"),
    )
    assert code == 4
    assert "lower the learning rate" in said
    assert "2 results computed, 0 known, 2 failed" in said
    assert "failed" in (tmp_path / "out" / "report.html").read_text()


def test_bugs_are_failures_and_full_disks_are_not(capsys):
    def bug():
        raise RuntimeError("out of memory")

    def full():
        raise EnvironmentFault("cannot be written: No space left on device")

    assert _attempt(bug) == Failure("RuntimeError: out of memory", 1)
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(EnvironmentFault):
        _attempt(full)
