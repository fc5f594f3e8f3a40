"""An encoder small enough for tests: ViT-Ti/16 on 64-pixel images, as an MAE checkpoint."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from frepa_dist.models.vit_mae import create_vit_mae


@pytest.fixture(scope="session")
def small_encoder(tmp_path_factory):
    """Path of the checkpoint."""
    path = tmp_path_factory.mktemp("encoder") / "mae.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(create_vit_mae("tiny", image_size=64).state_dict(), path)
    return str(path)
