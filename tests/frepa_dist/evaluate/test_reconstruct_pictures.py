"""Pictures of reconstructions are of the images that were measured, and the command shows them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from frepa_dist.evaluate.reconstruct import ReconstructionResult
from frepa_dist.evaluate.reconstruct_pictures import NUM_SHOWN, draw_reconstructions
from tests.commands import frepa


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 255, (70, 80, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def test_pictures_beside_spectra_and_values_image_by_image(folder, make_backbone_run, tmp_path):
    run, _ = make_backbone_run("convnext_twin", image_size=64)
    out, page = tmp_path / "result.json", tmp_path / "page.html"
    told = frepa("evaluate", "reconstruct", run, folder, "--num", 3, "--out", out, "--page", page)
    assert told.returncode == 0, told.stderr
    result = ReconstructionResult.model_validate_json(out.read_text())
    assert sum(row.common for row in result.rows) == 2
    for row in result.rows:
        assert len(row.by_image["relative"]) == 3
        assert np.mean(row.by_image["relative"]) == pytest.approx(row.relative.mean, rel=1e-5)
    shown = page.read_text()
    num = NUM_SHOWN * len(result.rows)
    assert (shown.count("<img"), shown.count("<svg")) == (3 * num, num)
    drawn = draw_reconstructions(run, folder, num=3)
    assert len(drawn) == num
    for number, row in enumerate(drawn):
        _, (_, hidden), (_, words), (spectra, _) = row
        image, place = divmod(number, len(result.rows))
        measured = result.rows[place]
        assert hidden == measured.corruption
        assert words.startswith(f"relative error {measured.by_image['relative'][image]:.3f}")
        assert [line.get_label() for line in spectra.axes[0].lines] == ["original", "seen", "restored"]
