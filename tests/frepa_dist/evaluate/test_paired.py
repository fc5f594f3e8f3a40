"""Comparing results: which test is taken, what it says, and that other test images are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from frepa_dist.evaluate.compare import delong, holm, permutation_test
from frepa_dist.evaluate.paired import Comparison, compare_pair, compare_results, run_compare
from frepa_dist.evaluate.probe_result import ImageScores, ProbeResult, estimate
from frepa_dist.evaluate.scores import macro_auprc, macro_auroc
from shards.support.errors import DataError


def draw(gain, *, seed=0, num=160, num_classes=2, per_patient=1):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.random.default_rng(9).integers(0, num_classes, num // per_patient), per_patient)
    scores = rng.normal(size=(num, num_classes)) + gain * np.eye(num_classes)[y]
    if num_classes == 2:  # as heads give them: one number, and its opposite
        scores = np.stack([scores[:, 0] - scores[:, 1], scores[:, 1] - scores[:, 0]], axis=1)
    groups = np.arange(num) // per_patient if per_patient > 1 else None
    return ProbeResult(
        encoder=f"gain {gain}",
        images="images",
        label_column=None,
        classes=[str(k) for k in range(num_classes)],
        num_train=[5] * num_classes,
        num_test=np.bincount(y).tolist(),
        num_left_out=0,
        split="given",
        head="logistic",
        chosen={},
        at_edge=False,
        inner_auroc=None,
        resampled="images" if groups is None else "patients",
        measures=estimate(scores, y, groups, num_resamples=10),
        num_resamples=10,
        seed=0,
        smoke_test=False,
        test=ImageScores(
            names=[f"{i}.png" for i in range(num)],
            y=y.tolist(),
            groups=None if groups is None else groups.tolist(),
            scores=scores.tolist(),
        ),
    )


def test_two_classes_of_independent_images_are_compared_by_delong():
    results = {"good": draw(1.5), "bad": draw(0.2, seed=1), "fair": draw(0.8, seed=2)}
    found = compare_results(results, num=200)
    assert [(p.first, p.second) for p in found.pairs] == [("good", "bad"), ("good", "fair"), ("bad", "fair")]
    assert {pair.test for pair in found.pairs} == {"DeLong"}
    scores = [np.array(results[name].test.scores) for name in ("good", "bad")]
    y = np.array(results["good"].test.y)
    exact = delong(scores[0][:, 1], scores[1][:, 1], y == 1)
    assert (found.pairs[0].value, found.pairs[0].p) == (exact.value, exact.p)
    np.testing.assert_allclose([p.p_holm for p in found.pairs], holm(np.array([p.p for p in found.pairs])))
    assert found.pairs[0].value == pytest.approx(
        results["good"].auroc.value - results["bad"].auroc.value, abs=1e-9
    )
    assert Comparison.model_validate(found.as_json()) == found
    assert "(DeLong)" in found.describe()


def test_what_delong_cannot_tell_is_permuted():
    right, wrong = draw(0.0, num=40), draw(0.0, num=40)
    y = np.array(right.test.y)
    for result, sign in ((right, 1), (wrong, -1)):
        result.test.scores[:] = (sign * np.stack([-y, y], axis=1)).tolist()
    found = compare_pair(right, wrong, "auroc", num=400)
    assert (found.value, found.test) == (1, "permutation")
    assert 0 < found.p < 0.05


@pytest.mark.parametrize(
    ("num_classes", "per_patient", "measure"), [(3, 1, "auroc"), (2, 2, "auroc"), (2, 1, "auprc")]
)
def test_everything_else_is_compared_by_permutation_of_patients(num_classes, per_patient, measure):
    options = {"num_classes": num_classes, "per_patient": per_patient}
    results = {"good": draw(1.0, **options), "bad": draw(0.1, seed=1, **options)}
    found = compare_results(results, measure=measure, num=100)
    (pair,) = found.pairs
    assert pair.test == "permutation"
    assert found.num_units == 160 // per_patient
    one, y, groups = results["good"].test.arrays()
    other, _, _ = results["bad"].test.arrays()
    kind = macro_auroc if measure == "auroc" else macro_auprc
    exact = permutation_test(one, other, y, groups, kind, num=100)
    assert (pair.value, pair.p) == (exact.value, exact.p)


def test_other_test_images_are_refused(tmp_path):
    good = draw(1.0)
    less = draw(1.0, num=158)
    other_labels = draw(1.0, seed=1)
    y = [1 - k for k in good.test.y]
    changed = other_labels.model_copy(update={"test": other_labels.test.model_copy(update={"y": y})})
    renamed = good.model_copy(update={"classes": ["a", "b"]})
    for other, problem in (
        (less, r"2 test images are in one of them alone, such as 158\.png"),
        (changed, "other labels"),
        (renamed, "their classes are 0, 1 and a, b"),
        (draw(1.0, per_patient=2), "labels|patients"),
    ):
        with pytest.raises(DataError, match=problem):
            compare_results({"one": good, "two": other})
    with pytest.raises(DataError, match="1 result"):
        compare_results({"one": good})
    (tmp_path / "no.json").write_text(json.dumps({"auroc": 1}))
    with pytest.raises(DataError, match="not a result of `frepa evaluate probe`"):
        run_compare([tmp_path / "no.json", tmp_path / "none.json"])


def test_files_are_told_apart(tmp_path):
    for name, gain in (("a", 1.0), ("b", 0.2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "probe.json").write_text(json.dumps(draw(gain, seed=ord(name)).as_json()))
    files = [tmp_path / name / "probe.json" for name in ("a", "b")]
    assert list(run_compare(files).values) == [str(path) for path in files]
    with pytest.raises(DataError, match="named twice"):
        run_compare([files[0], files[0]])
