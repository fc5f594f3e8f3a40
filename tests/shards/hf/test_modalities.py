"""The table of modalities, and what its rules do on real images: tokens lie on structure and stay there."""

from __future__ import annotations

import csv
import os
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pytest

from shards.hf.modalities import MODALITIES, find_modality
from shards.hf.tokens import HFParams, hf_token_indices
from shards.schema import SourceBuild
from shards.support.errors import ConfigError

SETS = {
    "ct": "sarscov2_ct",
    "mri": "brain_tumor_mri",
    "xray": "covid19_nih",
    "ultrasound": "busi",
    "oct": "duke_dme_subject01",
    "dermoscopy": "ham10000",
    "histopathology": "lc25000_lung",
    "endoscopy": "kvasir_cpchild",
}
PATCH = 16


def test_the_nine_modalities_have_names_that_fit_the_format():
    assert len(MODALITIES) == 9
    for name, modality in MODALITIES.items():
        assert modality.name == name
        SourceBuild(modality=name, source="a", counts={}, plan_digests=[], settings={})


def test_only_fundus_depends_on_what_was_searched_for_it():
    fundus = find_modality("fundus").hf
    assert (fundus.channel, fundus.fov, fundus.fov_paper) == ("green", "adaptive", True)
    for name, modality in MODALITIES.items():
        if name != "fundus":
            assert modality.hf.background_sigma == 0.04
            assert modality.hf.log_offset is None


def test_modalities_have_digests_of_their_own():
    assert len({modality.hf.digest() for modality in MODALITIES.values()}) == 9


def test_intensity_follows_the_modality():
    rules = {name: modality.intensity for name, modality in MODALITIES.items()}
    assert rules["ct"].kind == "hounsfield"
    assert (rules["mri"].kind, rules["mri"].scope) == ("percentiles", "volume")
    assert (rules["xray"].kind, rules["xray"].scope) == ("percentiles", "image")
    assert {rule.kind for name, rule in rules.items() if name not in ("ct", "mri", "xray")} == {"as_is"}


def test_an_unknown_modality_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"petscan.*fundus, ct, mri"):
        find_modality("petscan")


# real images


@lru_cache(maxsize=8)
def real_images(name: str, num: int = 30) -> list[np.ndarray]:
    """Every k-th image of a modality's set, (H, W) or (H, W, 3) RGB."""
    root = os.environ.get("FREPA_TEST_DATA")
    if not root:
        pytest.skip("FREPA_TEST_DATA names no folder of real images")
    folder = Path(root) / name / SETS[name]
    if not folder.is_dir():
        pytest.skip(f"FREPA_TEST_DATA has no {name}/{SETS[name]}")
    with (folder / "labels.csv").open(newline="") as table:
        files = [row["filename"] for row in csv.DictReader(table)]
    images = []
    for file in files[:: max(1, len(files) // num)]:
        image = cv2.imread(str(folder / file), cv2.IMREAD_UNCHANGED)
        images.append(image if image.ndim == 2 else np.ascontiguousarray(image[:, :, 2::-1]))
    return images


def tokens_of(image: np.ndarray, params: HFParams) -> np.ndarray:
    return hf_token_indices(image, PATCH, 0.25, params)


def patch_shares(mask: np.ndarray) -> np.ndarray:
    rows, columns = mask.shape[0] // PATCH, mask.shape[1] // PATCH
    part = mask[: rows * PATCH, : columns * PATCH].reshape(rows, PATCH, columns, PATCH)
    return np.asarray(part.mean(axis=(1, 3)).ravel())


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    return np.intersect1d(first, second).size / first.size


def mean_share(name: str, masks: list[np.ndarray], above: float, params: HFParams | None = None) -> float:
    """Share of kept tokens whose patch is covered by the image's mask to more than `above`."""
    params = params or find_modality(name).hf
    pairs = zip(real_images(name), masks, strict=True)
    return float(np.mean([(patch_shares(m)[tokens_of(im, params)] > above).mean() for im, m in pairs]))


def reaching_frame(mask: np.ndarray) -> np.ndarray:
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    return np.asarray(np.isin(labels, edge[edge > 0]))


def draw_lettering(image: np.ndarray, name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Burn words (and callipers) in, as blurred as the rest, through JPEG; the image and where they are."""
    rng = np.random.default_rng(seed)
    height, width = image.shape[:2]
    layer = np.zeros((2 * height, 2 * width), np.uint8)
    words = {
        "xray": [("L", 1.1, 4), ("PORTABLE", 0.55, 2)],
        "endoscopy": [("17/04/2013", 0.5, 1), ("12:45:07", 0.5, 1), ("CVP:4", 0.5, 1)],
        "ultrasound": [("LT LIQ", 0.55, 2), ("RT 10 OCLOCK", 0.5, 2), ("+", 0.6, 2), ("+", 0.6, 2)],
    }[name]
    for text, scale, thickness in words:
        (wide, high), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
        place = (int(rng.integers(8, 2 * width - wide - 8)), int(rng.integers(high + 8, 2 * height - 8)))
        cv2.putText(layer, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, thickness, cv2.LINE_AA)
    opacity = cv2.resize(layer, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    weight = opacity if image.ndim == 2 else opacity[:, :, None]
    burnt = np.rint(image * (1 - weight) + 245 * weight).astype(np.uint8)
    _, data = cv2.imencode(".jpg", burnt, [cv2.IMWRITE_JPEG_QUALITY, 90])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_UNCHANGED)), opacity > 0.25


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["xray", "ultrasound", "endoscopy"])
def test_burnt_in_lettering_draws_no_tokens(name: str) -> None:
    """A quarter of the lettered patches would be kept by chance, three quarters are without the rule."""
    params = find_modality(name).hf
    plain = params.model_copy(update={"mark_contrast": 0.0})
    kept: dict[str, list[float]] = {"with": [], "without": []}
    same = []
    for seed, image in enumerate(real_images(name)):
        lettered, where = draw_lettering(image, name, seed)
        marked = np.flatnonzero(patch_shares(where) > 0.02)
        for which, chosen in (("with", plain), ("without", params)):
            kept[which].append(agreement(marked, tokens_of(lettered, chosen)))
        same.append(agreement(tokens_of(image, params), tokens_of(lettered, params)))
    print(f"{name}: lettered patches kept {np.mean(kept['with']):.3f} -> {np.mean(kept['without']):.3f}")
    print(f"{name}: agreement with the image before lettering {np.mean(same):.3f}")
    assert np.mean(kept["with"]) >= 0.65
    assert np.mean(kept["without"]) <= 0.35
    assert np.mean(same) >= 0.94


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "floor"),
    [
        ("ct", 0.95),
        ("mri", 0.94),
        ("xray", 0.88),
        ("ultrasound", 0.93),
        ("oct", 0.93),
        ("dermoscopy", 0.86),
        ("histopathology", 0.92),
        ("endoscopy", 0.84),
    ],
)
def test_tokens_are_not_sensor_noise(name: str, floor: float) -> None:
    """Tokens stay when noise of standard deviation 5 of 255 is added, but for digital padding."""
    rng = np.random.default_rng(0)
    params = find_modality(name).hf
    shares = []
    for image in real_images(name):
        noisy = np.clip(np.rint(image + rng.normal(0, 5, image.shape)), 0, 255)
        flat = cv2.morphologyEx(
            ((image <= 3) | (image >= 252)).astype(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8)
        )
        noisy = np.where(flat > 0, image, noisy).astype(np.uint8)
        shares.append(agreement(tokens_of(image, params), tokens_of(noisy, params)))
    print(f"{name}: agreement with added noise {np.mean(shares):.3f}")
    assert np.mean(shares) >= floor


@pytest.mark.real_data
def test_oct_tokens_lie_on_the_retina() -> None:
    images = real_images("oct")
    white = [reaching_frame(image >= 250) for image in images]
    retina = [
        cv2.GaussianBlur(np.where(w, 0, im).astype(np.float32), (0, 0), 6) > 40
        for im, w in zip(images, white, strict=True)
    ]
    on, padding = mean_share("oct", retina, 0.25), mean_share("oct", white, 0.02)
    before = mean_share("oct", retina, 0.25, HFParams(channel="luminance", fov="none"))
    print(f"oct: tokens on the retina {before:.3f} -> {on:.3f}, touching padding {padding:.3f}")
    assert on >= 0.89
    assert before <= 0.6
    assert padding <= 0.02


@pytest.mark.real_data
def test_mri_tokens_do_not_lie_on_the_skin() -> None:
    """Air: what is nearly black and reaches the frame."""
    images = [im if im.ndim == 2 else im[:, :, 1] for im in real_images("mri")]
    air = [reaching_frame(cv2.blur(image, (5, 5)) <= 12) for image in images]
    touching = mean_share("mri", air, 0.05)
    before = mean_share("mri", air, 0.05, HFParams(channel="luminance"))
    print(f"mri: tokens that touch the air {before:.3f} -> {touching:.3f}")
    assert touching <= 0.03


@pytest.mark.real_data
def test_dermoscopy_tokens_do_not_lie_in_dark_corners() -> None:
    images = real_images("dermoscopy", 100)
    params = find_modality("dermoscopy").hf
    before, after, seen = [], [], 0
    for image in images:
        level = image.max(axis=2)
        corner = np.zeros(level.shape, bool)
        corner[np.ix_(np.r_[:32, -32:0], np.r_[:32, -32:0])] = True
        dark = patch_shares(corner & (level < 0.45 * np.median(level))) > 0.3
        seen += int(dark.sum())
        before.append(dark[tokens_of(image, HFParams(channel="luminance"))].sum())
        after.append(dark[tokens_of(image, params)].sum())
    print(f"dermoscopy: tokens in {seen} dark corner patches {sum(before)} -> {sum(after)}")
    assert seen >= 20
    assert sum(after) <= 0.02 * seen


@pytest.mark.real_data
def test_endoscopy_tokens_do_not_seek_highlights_or_the_black_surround() -> None:
    images = real_images("endoscopy")
    white = [image.min(axis=2) >= 200 for image in images]
    black = [reaching_frame(image.max(axis=2) <= 12) for image in images]
    highlights = mean_share("endoscopy", white, 0.03)
    before = mean_share("endoscopy", white, 0.03, HFParams())
    surround = mean_share("endoscopy", black, 0.3)
    print(f"endoscopy: tokens on highlights {before:.3f} -> {highlights:.3f}, on black {surround:.3f}")
    assert highlights <= 0.75 * before
    assert surround <= 0.005


@pytest.mark.real_data
def test_histopathology_tokens_lie_on_tissue() -> None:
    glass = []
    for image in real_images("histopathology"):
        darkest = image.min(axis=2).astype(int)
        glass.append((darkest > 190) & (image.max(axis=2) - darkest < 40))
    on_glass = mean_share("histopathology", glass, 0.8)
    print(f"histopathology: tokens on glass {on_glass:.4f}")
    assert on_glass <= 0.002
