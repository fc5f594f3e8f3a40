from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frepa_dist.masking import mask_first, num_kept, random_masking
from shards.support.errors import ConfigError


@given(st.integers(2, 300), st.integers(1, 4), st.floats(0.05, 0.95), st.integers(0, 2**31))
def test_a_split_keeps_each_token_once_and_the_smallest_noise(tokens, batch, ratio, seed):
    try:
        kept = num_kept(tokens, ratio)
    except ConfigError:
        return
    noise = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed))
    ids_keep, ids_restore, mask = random_masking(noise, ratio)
    assert ids_keep.shape == (batch, kept)
    assert mask.sum(1).tolist() == [tokens - kept] * batch
    for row in range(batch):
        visible = set(ids_keep[row].tolist())
        assert visible == set((mask[row] == 0).nonzero()[:, 0].tolist())
        assert noise[row][mask[row] == 0].max() <= noise[row][mask[row] == 1].min()
        # token n stands at place ids_restore[n] of "kept, then removed"
        assert ids_restore[row][ids_keep[row]].tolist() == list(range(kept))
        assert sorted(ids_restore[row].tolist()) == list(range(tokens))


def test_the_reference_counts():
    assert num_kept(196, 0.75) == 49
    assert (
        num_kept(100, 0.9) == 9
    )  # 100 * (1 - 0.9) is a little less than 10 in floating point, as in the reference


@pytest.mark.parametrize(("tokens", "ratio"), [(4, 0.9), (16, 0.0)])
def test_a_ratio_that_leaves_nothing_is_refused(tokens, ratio):
    with pytest.raises(ConfigError, match="mask_ratio"):
        num_kept(tokens, ratio)


@given(st.integers(0, 2**31))
def test_the_tokens_named_are_masked_before_any_other(seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(3, 36, generator=generator)
    hf = torch.rand(3, 36, generator=generator).argsort(1)[:, :9]
    mask = random_masking(mask_first(noise, hf), 0.75).mask
    assert mask.gather(1, hf).eq(1).all()
    mask = random_masking(mask_first(noise, hf), 0.125).mask  # fewer are masked than are named
    assert mask.gather(1, hf).sum(1).tolist() == mask.sum(1).tolist()
