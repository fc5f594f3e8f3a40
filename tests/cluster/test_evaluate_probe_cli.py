"""`frepa evaluate probe` and what builds on it: options reach the results, bad input is one line."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from frepa_dist.evaluate.label_curve import LabelCurve
from frepa_dist.evaluate.paired import Comparison
from frepa_dist.evaluate.probe_result import ProbeResult
from frepa_dist.evaluate.token_probe import TokenResult
from tests.commands import frepa
from tests.frepa_dist.evaluate.drawn import draw_labeled

ENCODER = "random:vit_tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw_labeled(folder, {"0": 60, "1": 120, "2": 180}, num_patients=4)
    return folder


@pytest.fixture(scope="module")
def common(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return [folder, "--labels", folder / "labels.csv", "--cache", cache, "--smoke-test", "--resamples", 20]


@pytest.fixture(scope="module")
def probes(common, tmp_path_factory):
    """Results of two heads, and what was said."""
    out = tmp_path_factory.mktemp("results")
    said = {}
    for head in ("logistic", "knn"):
        told = frepa(
            "evaluate", "probe", ENCODER, *common, "--head", head, "--grades", "--out", out / f"{head}.json"
        )
        assert told.returncode == 0, told.stderr
        said[head] = told
    return out, said


def read(kind, path):
    return kind.model_validate(json.loads(path.read_text()))


def test_probe(probes):
    out, said = probes
    for head, told in said.items():
        result = read(ProbeResult, out / f"{head}.json")
        assert result.describe() in told.stdout
        assert (result.head, result.smoke_test, result.classes) == (head, True, ["0", "1", "2"])
        assert list(result.measures) == ["auroc", "auprc", "accuracy", "balanced_accuracy", "kappa"]
    assert "features" in said["logistic"].stderr
    assert "features" not in said["knn"].stderr  # all known


def test_compare(probes, tmp_path):
    out, _ = probes
    files = [out / "logistic.json", out / "knn.json"]
    told = frepa("evaluate", "compare", *files, "--permutations", 50, "--out", tmp_path / "c.json")
    assert read(Comparison, tmp_path / "c.json").describe() in told.stdout
    again = frepa("evaluate", "compare", files[0], files[0])
    assert (again.returncode, again.stderr.count("\n")) == (3, 1)


def test_curve_and_tokens(common, tmp_path):
    told = frepa(
        *(
            "evaluate",
            "label-curve",
            ENCODER,
            *common,
            "--classes",
            "0,2",
            "--shares",
            "20,100",
            "--draws",
            2,
        ),
        *("--head", "knn", "--page", tmp_path / "curve.html", "--out", tmp_path / "curve.json"),
    )
    curve = read(LabelCurve, tmp_path / "curve.json")
    assert curve.describe() in told.stdout
    assert curve.full.classes == ["0", "2"]
    assert (tmp_path / "curve.html").is_file()
    told = frepa(
        *("evaluate", "tokens", ENCODER, *common, "--modality", "fundus", "--head", "knn"),
        *("--permutations", 20),
        *("--out", tmp_path / "tokens.json"),
    )
    assert read(TokenResult, tmp_path / "tokens.json").describe() in told.stdout


def test_features(folder, common, tmp_path):
    out = tmp_path / "new" / "features.safetensors"
    told = frepa("evaluate", "features", ENCODER, folder, "--cache", common[4], "--out", out)
    assert "features of 24 images, 192 wide" in told.stdout
    with safe_open(out, "numpy") as file:
        assert file.get_tensor("features").shape == (24, 192)
        assert "00.png" in json.loads(file.metadata()["names"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("probe", ENCODER, "{0}", "--labels", "{0}/labels.csv", "--train", "epochs=2"),
            "not trained by steps",
        ),
        (("probe", ENCODER, "{0}", "--labels", "{0}/labels.csv", "--classes", "0"), "two classes"),
        (("probe", ENCODER, "{0}", "--labels", "{0}/labels.csv", "--seed", "-1"), "seed"),
        (("label-curve", ENCODER, "{0}", "--shares", "ten"), "percentages such as"),
        (("tokens", ENCODER, "{0}", "--labels", "{0}/labels.csv"), "--modality"),
        (("features", ENCODER, "{0}"), "would be lost"),
    ],
)
def test_what_is_wrong_is_said(folder, arguments, words):
    told = frepa("evaluate", *(part.format(folder) for part in arguments))
    assert told.returncode in (2, 3)
    assert words in told.stderr
    assert "Traceback" not in told.stderr
