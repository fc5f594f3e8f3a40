"""Draws depend on the sample's key and the purpose, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from frepa_dist.draws import SampleDraws

KEYS = [3, 2**63 - 1, 2**62, 0, 17]


def test_a_samples_numbers_do_not_depend_on_the_batch_it_is_in() -> None:
    whole = SampleDraws(KEYS, "cpu")
    part = SampleDraws([KEYS[3], KEYS[1]], "cpu")
    noise = whole.normal("noise", (2, 5, 7))
    assert torch.equal(part.normal("noise", (2, 5, 7)), noise[[3, 1]])
    assert torch.equal(whole.select([3, 1]).normal("noise", (2, 5, 7)), noise[[3, 1]])
    numbers = [rng.random(4) for rng in whole.generators("cells")]
    for rng, i in zip(part.generators("cells"), (3, 1), strict=True):
        np.testing.assert_array_equal(rng.random(4), numbers[i])


def test_what_was_drawn_before_changes_nothing() -> None:
    draws = SampleDraws(KEYS, "cpu")
    first = draws.normal("noise", (64,))
    draws.normal("other", (33,))
    torch.randn(5)
    assert torch.equal(draws.normal("noise", (64,)), first)


def test_keys_and_purposes_share_no_numbers() -> None:
    draws = SampleDraws(KEYS, "cpu")
    both = torch.cat([draws.normal("noise", (4096,)), draws.normal("fill", (4096,))])
    correlation = torch.corrcoef(both) - torch.eye(len(both))
    assert correlation.abs().max() < 5 / 64  # five deviations of 1 / sqrt(4096)
    numbers = np.array([rng.random(3) for purpose in "ab" for rng in draws.generators(purpose)])
    assert len(np.unique(numbers)) == numbers.size


def test_normal_numbers_are_normal() -> None:
    x = SampleDraws([5], "cpu").normal("noise", (1_000_000,))[0].double()
    assert abs(x.mean()) < 4e-3
    assert abs(x.std() - 1) < 3e-3
    assert abs((x**3).mean()) < 0.01
    assert abs((x**4).mean() - 3) < 0.03
    for quantile in (0.01, 0.25, 0.9, 0.999):
        expected = torch.special.ndtri(torch.tensor(quantile, dtype=torch.float64))
        assert (x < expected).double().mean() == pytest.approx(quantile, abs=2.5e-3)
    neighbours = torch.corrcoef(torch.stack([x[:-1], x[1:]]))[0, 1]
    assert abs(neighbours) < 5e-3


@pytest.mark.parametrize("size", [1, 3, 65_536, 65_537, 140_001])
def test_any_number_of_numbers_can_be_drawn(size: int) -> None:
    draws = SampleDraws([8, 9], "cpu")
    room = torch.full((2, size), torch.nan)
    assert draws.normal("noise", (size,), out=room) is room
    assert torch.isfinite(room).all()
    assert torch.equal(draws.normal("noise", (size,)), room)
    longest = draws.normal("noise", (150_000,))
    assert torch.equal(longest[:, :size], room)  # blocks do not start the stream anew
