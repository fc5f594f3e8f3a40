"""Colors of tokens: scikit-learn's components, the foreground of a closed case, and the command."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sklearn.decomposition import PCA

from frepa_dist.evaluate.token_pca import TokenPcaResult, color_tokens, principal_components
from tests.commands import frepa


def test_components_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 6)) @ np.diag([5, 3, 2, 1, 0.5, 0.1]) + 7
    values, explained = principal_components(rows, 3)
    reference = PCA(3).fit(rows)
    np.testing.assert_allclose(explained, reference.explained_variance_ratio_)
    np.testing.assert_allclose(np.abs(values), np.abs(reference.transform(rows)), atol=1e-9)
    again, _ = principal_components(rows[::-1], 3)
    np.testing.assert_allclose(again[::-1], values)


def two_regions(num=2, side=8, margin=2):
    """Maps (n, D, h, w) whose middle differs from the border in a strong direction."""
    rng = np.random.default_rng(1)
    maps = rng.normal(0, 0.1, (num, 5, side, side))
    maps[:, 0, margin:-margin, margin:-margin] += 10
    maps[:, 1, margin:-margin, margin:4] += 3
    return maps


def test_regions_have_their_colors():
    colors, explained, num_tokens = color_tokens(two_regions())
    assert colors.shape == (2, 8, 8, 3)
    assert num_tokens == 128
    assert explained[0] > 0.8
    red = colors[..., 0].astype(int)
    inside = np.zeros((8, 8), bool)
    inside[2:-2, 2:-2] = True
    assert abs(red[:, inside].mean() - red[:, ~inside].mean()) > 100


@pytest.mark.parametrize("margin", [1, 2])  # the foreground has more tokens than the border, or fewer
@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_what_the_border_is_not(margin, sign):
    colors, _, num_tokens = color_tokens(sign * two_regions(margin=margin), foreground=True)
    inside = np.zeros((8, 8), bool)
    inside[margin:-margin, margin:-margin] = True
    assert num_tokens == 2 * inside.sum()
    assert not colors[:, ~inside].any()
    assert colors[:, inside].any(axis=-1).mean() > 0.9


def test_the_page_shows_images_and_colors(small_encoder, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        coarse = Image.fromarray(rng.integers(0, 255, (7, 7, 3), dtype=np.uint8)).resize((80, 70))
        coarse.save(tmp_path / f"{number}.png")
    out, page = tmp_path / "result.json", tmp_path / "page.html"
    told = frepa(
        *("evaluate", "token-pca", small_encoder, tmp_path, "--num", 3, "--layer", "blocks.5"),
        *("--out", out, "--page", page),
    )
    assert told.returncode == 0, told.stderr
    result = TokenPcaResult.model_validate_json(out.read_text())
    assert (result.rows[0].num_images, result.rows[0].num_tokens) == (3, 3 * 16)
    assert 0 < sum(result.rows[0].explained) <= 1
    assert page.read_text().count("<img") == 6
    assert "48 tokens of 3 images" in told.stdout
