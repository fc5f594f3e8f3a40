"""The loader on CT in Hounsfield units: 16 bits, shown through windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shards.read.crops import apply_crop, random_crop
from shards.read.draws import sample_rng
from shards.read.stream import SampleStream, StreamConfig
from shards.read.windows import CT_WINDOWS, WindowConfig
from tests.shards.streams import ORDER, join, stream_of


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, write_dataset) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    write_dataset(folder, {"ct": [12, 9], "fundus": [11]})
    return folder


class TestHounsfield:
    """CT, stored as int16, beside 8-bit pictures."""

    def test_what_a_method_sees_is_the_windowed_crop(self, mixed, draw_image):
        """Against plain NumPy, whatever the other samples of the micro-batch are."""
        config = StreamConfig(root=str(mixed), image_size=32, patch_size=8, seed=3)
        for micro in (1, 2, 8):
            stream = SampleStream(config, ORDER, 0, 1, micro)
            for batch in stream.batches(0):
                seen = join(batch)
                for i, position in enumerate(seen["position"].tolist()):
                    number = int(seen["key"][i][-2:])
                    image = draw_image(number, "ct" if number < 21 else "fundus")
                    low, high = seen["window"][i].numpy()
                    if number % 2 and number > 20:
                        assert (low, high) == (0, 255)
                        continue  # a JPEG
                    rng = sample_rng(3, 0, position, "crop")
                    crop = random_crop(rng, *image.shape[:2], scale=(0.2, 1), ratio=(3 / 4, 4 / 3), flip=True)
                    pixels = apply_crop(image, crop, 32).astype(np.float32)
                    expected = np.clip((pixels - low) / (high - low), 0, 1)
                    planes = np.broadcast_to(
                        expected if expected.ndim == 2 else expected.transpose(2, 0, 1), (3, 32, 32)
                    )
                    np.testing.assert_array_equal(seen["image"][i].numpy(), planes)

    def test_types_and_channels_of_a_micro_batch(self, mixed):
        kinds = set()
        for batch in stream_of(mixed).batches(1):
            for micro in batch:
                numbers = [int(key[-2:]) for key in micro["key"]]
                is_color = any(n > 20 and n % 5 for n in numbers)
                assert micro["image"].shape[1] == (3 if is_color else 1)
                has_ct = any(n < 21 for n in numbers)
                assert micro["image"].dtype == (torch.int16 if has_ct else torch.uint8)
                kinds.add((has_ct, is_color))
        assert {(True, True), (True, False), (False, True)} <= kinds

    def test_ranks_workers_and_resume_change_nothing(self, mixed):
        whole = [join(batch) for batch in stream_of(mixed, micro=8).batches(2)]
        for rank in (0, 1):
            parts = stream_of(mixed, rank, 2, micro=1, num_workers=1).batches(2, 1)
            for part, batch in zip(map(join, parts), whole[1:], strict=True):
                for name, value in batch.items():
                    mine = value[4 * rank : 4 * rank + 4]
                    assert part[name] == mine if name == "key" else torch.equal(part[name], mine), name

    def test_windows_are_drawn_as_configured(self, mixed):
        config = WindowConfig(names=("brain",), level_jitter=0, width_jitter=0)
        for settings, window in (({"ct_windows": config}, [0, 80]), ({"augment": False}, [-1000, 1000])):
            for batch in stream_of(mixed, **settings).batches(0):
                for key, found in zip(join(batch)["key"], join(batch)["window"].tolist(), strict=True):
                    assert found == (window if int(key[-2:]) < 21 else [0, 255])
        windows = torch.cat([join(b)["window"] for e in range(8) for b in stream_of(mixed).batches(e)])
        windows = windows[windows[:, 1] != 255]
        assert len(windows.unique(dim=0)) > 0.95 * len(windows)  # jittered
        widths = windows[:, 1] - windows[:, 0]
        nearest = [min(CT_WINDOWS, key=lambda n: abs(CT_WINDOWS[n][1] / w - 1)) for w in widths.tolist()]
        assert set(nearest) == set(CT_WINDOWS)
