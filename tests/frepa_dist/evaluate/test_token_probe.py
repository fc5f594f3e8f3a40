"""The token budget: each variant sees the tokens of its name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from frepa_dist.evaluate.extract import Extraction, extract
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.pictures import open_pictures
from frepa_dist.evaluate.task import ProbeTask
from frepa_dist.evaluate.token_probe import ALL, TokenLook, TokenResult, run_token_probe
from shards.support.errors import ConfigError
from tests.frepa_dist.evaluate.drawn import draw_labeled


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw_labeled(folder, {"dark": 60, "light": 180}, num_patients=5)
    return folder


def test_each_variant_sees_its_tokens(folder, small_encoder, tmp_path):
    pictures, look = open_pictures(folder, "fundus"), TokenLook(0.25, seed=3)
    encoder = load_encoder(small_encoder, "cpu")
    found = extract(small_encoder, pictures, Extraction(cache=tmp_path, batch_size=7), look)
    assert found.shape == (20, 5, 192)
    view = pictures.views([4], encoder.grid)[0]
    image, order = torch.from_numpy(view.image)[None], torch.from_numpy(view.hf_order)[None]
    named = dict(zip(look.variants(), found[4], strict=True))
    expected = {
        ALL: None,
        "HF tokens only (25%)": order[:, :4],
        "LF tokens only (lowest 25%)": order[:, -4:],
        "HF tokens removed (75% kept)": order[:, 4:],
    }
    for name, ids in expected.items():
        np.testing.assert_allclose(named.pop(name), encoder.encode(image, ids)[0].numpy(), atol=1e-5)
    assert list(named) == ["random tokens (25%)"]


def test_random_tokens_belong_to_the_picture_and_the_seed(folder, small_encoder):
    pictures = open_pictures(folder, "fundus")
    turned = type(pictures)(folder, pictures.names[::-1], "fundus")

    def random(some, seed):
        return extract(small_encoder, some, Extraction(batch_size=6), TokenLook(0.25, seed))[:, 4]

    np.testing.assert_allclose(random(turned, 0)[::-1], random(pictures, 0), atol=1e-5)
    assert np.abs(random(pictures, 1) - random(pictures, 0)).max() > 1e-3


def test_end_to_end(folder, small_encoder):
    task = ProbeTask(images=str(folder), labels=folder / "labels.csv", modality="fundus", num_resamples=20)
    result = run_token_probe(small_encoder, task, head="knn", num_permutations=20)
    assert len(result.rows) == 5
    assert result.rows[ALL].auroc.value == 1.0
    assert [one.first for one in result.differences] == list(result.rows)[1:]
    assert {one.second for one in result.differences} == {ALL}
    assert TokenResult.model_validate(result.as_json()) == result
    assert "HF tokens removed (75% kept)" in result.describe()
    with pytest.raises(ConfigError, match="--modality"):
        run_token_probe(small_encoder, task.model_copy(update={"modality": None}))
    with pytest.raises(ConfigError, match="no tokens"):
        run_token_probe("random:convnext_twin", task)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        run_token_probe(small_encoder, task, keep=1.0)
