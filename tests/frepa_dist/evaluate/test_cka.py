"""Debiased CKA: its known values, its invariances, and the published formula written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from frepa_dist.evaluate import cka
from frepa_dist.evaluate.cka import CkaConfig, debiased_linear_cka, embed_parts, jackknife_error, run_cka
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.views import View
from shards.support.errors import ConfigError, DataError


def naive_hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """HSIC_1 of Song et al. (2012), eq. 5, term by term, loops for the sums."""
    n = len(k)
    k, l = k * (1 - np.eye(n)), l * (1 - np.eye(n))  # noqa: E741
    trace = sum(k[i, j] * l[j, i] for i in range(n) for j in range(n))
    sums = sum(k[i, j] for i in range(n) for j in range(n)) * sum(l[i, j] for i in range(n) for j in range(n))
    chain = sum(float(k[i] @ l[:, j]) for i in range(n) for j in range(n))
    return (trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * chain) / (n * (n - 3))


def naive_cka(x: np.ndarray, y: np.ndarray) -> float:
    k, l = x @ x.T, y @ y.T  # noqa: E741
    return naive_hsic(k, l) / math.sqrt(naive_hsic(k, k) * naive_hsic(l, l))


def biased_cka(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return float(np.sum((x.T @ y) ** 2) / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


@given(st.integers(4, 12), st.integers(1, 8), st.integers(1, 8), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_equals_the_published_formula(n, d, e, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)) + 1, rng.normal(size=(n, e))
    assert debiased_linear_cka(x, y) == pytest.approx(naive_cka(x, y), abs=1e-9)


def test_is_one_on_itself_and_symmetric():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 5)), rng.normal(size=(20, 9))
    assert debiased_linear_cka(x, x) == pytest.approx(1)
    assert debiased_linear_cka(x, y) == pytest.approx(debiased_linear_cka(y, x))


def test_ignores_rotation_shift_and_scale():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(30, 6))
    y = x[:, :3] + rng.normal(size=(30, 3))
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    assert debiased_linear_cka(x, 7.5 * y @ rotation + 100) == pytest.approx(debiased_linear_cka(x, y))


def test_independent_noise_is_about_zero_where_the_biased_one_is_not():
    rng = np.random.default_rng(2)
    pairs = [(rng.normal(size=(24, 64)), rng.normal(size=(24, 64))) for _ in range(60)]
    assert abs(np.mean([debiased_linear_cka(x, y) for x, y in pairs])) < 0.02
    assert np.mean([biased_cka(x, y) for x, y in pairs]) > 0.5


def test_negative_estimates_are_numbers_and_constant_features_share_nothing():
    rng = np.random.default_rng(3)
    values = [debiased_linear_cka(rng.normal(size=(6, 3)), rng.normal(size=(6, 3))) for _ in range(200)]
    assert np.isfinite(values).all()
    assert min(values) < 0
    assert debiased_linear_cka(np.ones((9, 4)), rng.normal(size=(9, 4))) == 0.0


@pytest.mark.parametrize(
    ("x", "y", "word"),
    [
        (np.ones((3, 2)), np.ones((3, 2)), "at least 4"),
        (np.ones((5, 2)), np.ones((6, 2)), "same images"),
        (np.full((5, 2), np.nan), np.ones((5, 2)), "NaN"),
    ],
)
def test_what_cannot_be_compared_is_refused(x, y, word):
    with pytest.raises(DataError, match=word):
        debiased_linear_cka(x, y)


def test_jackknife_equals_leaving_rows_out_and_computing_again():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(14, 4))
    y = x + rng.normal(size=(14, 4))
    for num_groups in (14, 5):
        groups = np.array_split(np.arange(14), num_groups)
        left = [naive_cka(np.delete(x, g, axis=0), np.delete(y, g, axis=0)) for g in groups]
        expected = math.sqrt((num_groups - 1) / num_groups * np.sum((left - np.mean(left)) ** 2))
        assert jackknife_error(x, y, num_groups) == pytest.approx(expected)
    assert jackknife_error(x[:4], y[:4]) is None


def test_jackknife_error_is_about_the_spread_over_samples():
    rng = np.random.default_rng(5)
    values, errors = [], []
    for _ in range(80):
        x = rng.normal(size=(60, 3))
        y = x + rng.normal(size=(60, 3))
        values.append(debiased_linear_cka(x, y))
        errors.append(jackknife_error(x, y))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.25)


def test_token_subsets_are_the_ones_named(monkeypatch):
    encoder = load_encoder("random:tiny", "cpu")
    seen: list[torch.Tensor | None] = []

    def pool(images, ids_keep):
        seen.append(ids_keep)
        return torch.zeros(len(images), 192)

    monkeypatch.setitem(encoder.__dict__, "pool", pool)
    rng = np.random.default_rng(0)
    views = [View(np.zeros((3, 224, 224), np.uint8), rng.permutation(196)) for _ in range(2)]
    config = CkaConfig(num=4, keep=0.25, cutoff_cycles=13.4, batch_size=2, seed=0)
    names = list(embed_parts(encoder, views, 0, config))
    full, high, low, removed, drawn, high_passed, low_passed = seen
    order = np.stack([view.hf_order for view in views])
    assert full is high_passed is low_passed is None
    np.testing.assert_array_equal(high, order[:, :49])
    np.testing.assert_array_equal(low, order[:, -49:])
    np.testing.assert_array_equal(removed, order[:, 49:])
    assert drawn.shape == (2, 49)
    assert all(len(set(row.tolist())) == 49 for row in drawn)
    assert names[1:4] == [
        "HF tokens only (25%)",
        "LF tokens only (lowest 25%)",
        "HF tokens removed (75% kept)",
    ]
    assert names[4:] == ["random tokens (25%)", "high-passed image", "low-passed image"]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(6):
        coarse = Image.fromarray(rng.integers(0, 255, (7, 7, 3), dtype=np.uint8)).resize((80, 70))
        coarse.save(tmp_path / f"{number}.png")
    return tmp_path


def test_run_on_a_folder_of_images(folder, small_encoder):
    result = run_cka(small_encoder, folder, num=5, modality="histopathology", batch_size=2)
    assert [row.num_images for row in result.rows] == [5] * 6
    assert all(-1.5 <= row.cka <= 1.5 for row in result.rows)
    by_name = {row.variant: row for row in result.rows}
    assert by_name["low-passed image"].cka > 0.5
    assert "n = 5" in result.describe()
    assert cka.CkaResult.model_validate(result.as_json()) == result
    again = run_cka(small_encoder, folder, num=5, modality="histopathology", batch_size=4)
    assert [row.cka for row in again.rows] == pytest.approx([row.cka for row in result.rows], abs=1e-4)


def test_errors_of_a_run(folder, small_encoder):
    with pytest.raises(ConfigError, match="--modality"):
        run_cka(small_encoder, folder)
    for path in list(folder.iterdir())[3:]:
        path.unlink()
    with pytest.raises(DataError, match="at least 4"):
        run_cka(small_encoder, folder, modality="fundus")
