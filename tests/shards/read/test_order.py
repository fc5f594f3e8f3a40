"""The order of samples: exactly once, the same for every cut into ranks, and resumed by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume, given, reject
from hypothesis import strategies as st

from shards.read.draws import sample_rng
from shards.read.order import (
    EpochPlan,
    OrderConfig,
    check_batch_sizes,
    choose_num_streams,
    count_batches,
    plan_epoch,
    skip_excluded,
)
from shards.support.errors import ConfigError, DataError


@dataclass
class Case:
    counts: list[int]
    exclusions: dict[int, np.ndarray]
    config: OrderConfig
    epoch: int
    modalities: list[str] | None = None

    def plan(self, **changes) -> EpochPlan:
        config = self.config.model_copy(update={k: v for k, v in changes.items() if k != "epoch"})
        epoch = changes.get("epoch", self.epoch)
        return plan_epoch(self.counts, self.exclusions, config, epoch, modalities=self.modalities)

    def kept(self) -> list[tuple[int, int]]:
        return [
            (shard, row)
            for shard, count in enumerate(self.counts)
            for row in range(count)
            if row not in self.exclusions.get(shard, ())
        ]


@st.composite
def cases(draw) -> Case:
    counts = draw(st.lists(st.integers(1, 40), min_size=1, max_size=30))
    exclusions = {}
    for shard in draw(st.sets(st.integers(0, len(counts) - 1), max_size=5)):
        rows = draw(st.sets(st.integers(0, counts[shard] - 1), min_size=1))
        exclusions[shard] = np.array(sorted(rows), dtype=np.int64)
    num_streams = draw(st.integers(1, 8))
    config = OrderConfig(
        global_batch_size=num_streams * draw(st.integers(1, 12)),
        num_streams=num_streams,
        block_shards=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 2**63 - 1)),
    )
    case = Case(counts, exclusions, config, draw(st.integers(0, 1000)))
    assume(len(case.kept()) >= config.global_batch_size)
    return case


@st.composite
def weighted_cases(draw) -> Case:
    case = draw(cases())
    case.modalities = [draw(st.sampled_from(["ct", "oct"])) for _ in case.counts]
    alphas = st.floats(0, 1).map(lambda alpha: {"alpha": alpha})
    by_name = st.dictionaries(st.sampled_from(sorted(set(case.modalities))), st.floats(0, 3))
    weights = draw(st.one_of(st.just("uniform"), alphas, by_name))
    case.config = case.config.model_copy(update={"modality_weights": weights})
    try:
        case.plan()
    except DataError:  # the epoch is less than one batch
        reject()
    return case


def samples_of(plan: EpochPlan) -> list[list[tuple[int, int]]]:
    """(shard, row) of every slot of every batch."""
    batches = [plan.batch(k) for k in range(plan.num_batches)]
    return [list(zip(b.shard.tolist(), b.row.tolist(), strict=True)) for b in batches]


def naive_samples(case: Case) -> list[list[tuple[int, int]]]:
    """The text of shards/read/order.py, sample by sample."""
    config, kept, G = case.config, case.kept(), case.config.global_batch_size
    C = config.num_streams
    shards = np.array(sorted({shard for shard, _ in kept}))
    line = []
    for shard in sample_rng(config.seed, case.epoch, 0, "order.shards").permutation(shards):
        line += [sample for sample in kept if sample[0] == shard]
    streams, num_blocks = [], 0
    for c in range(C):
        stream = line[c * len(line) // C : (c + 1) * len(line) // C]
        own = list(dict.fromkeys(shard for shard, _ in stream))
        shuffled = []
        for first in range(0, len(own), config.block_shards):
            block = [s for s in stream if s[0] in own[first : first + config.block_shards]]
            order = sample_rng(config.seed, case.epoch, num_blocks, "order.block").permutation(len(block))
            shuffled += [block[i] for i in order]
            num_blocks += 1
        streams.append(shuffled)
    share = G // C
    return [[streams[j * C // G][k * share + j % share] for j in range(G)] for k in range(len(line) // G)]


@given(cases())
def test_every_sample_once_but_for_the_rest(case):
    plan, kept = case.plan(), case.kept()
    flat = [sample for batch in samples_of(plan) for sample in batch]
    G = case.config.global_batch_size
    assert plan.num_batches == len(kept) // G
    assert plan.num_batches == count_batches(case.counts, case.exclusions, case.config, case.epoch)
    assert len(flat) == len(set(flat)) == len(kept) - len(kept) % G
    assert set(flat) <= set(kept)


@given(cases())
def test_equals_the_naive_order(case):
    assert samples_of(case.plan()) == naive_samples(case)


@given(cases() | weighted_cases(), st.data())
def test_ranks_and_micro_batches_only_cut_the_global_batch(case, data):
    plan, G = case.plan(), case.config.global_batch_size
    k = data.draw(st.integers(0, plan.num_batches - 1))
    whole = plan.batch(k)
    np.testing.assert_array_equal(whole.slot, np.arange(G))
    np.testing.assert_array_equal(whole.position, k * G + np.arange(G))
    for world_size in (w for w in range(1, G + 1) if G % w == 0):
        share = G // world_size
        micro = data.draw(st.sampled_from([m for m in range(1, share + 1) if share % m == 0]))
        assert check_batch_sizes(G, world_size, micro) == share // micro
        fresh = case.plan()  # each rank has a plan of its own
        ranks = [fresh.rank_batch(k, rank, world_size) for rank in range(world_size)]
        parts = [rank.part(begin, begin + micro) for rank in ranks for begin in range(0, share, micro)]
        for field in whole._fields:
            joined = np.concatenate([getattr(part, field) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, field))


@given(cases() | weighted_cases(), st.data())
def test_resume_gives_what_would_have_come(case, data):
    whole = samples_of(case.plan())
    start = data.draw(st.integers(0, len(whole) - 1))
    resumed = case.plan()
    assert [
        list(zip(b.shard.tolist(), b.row.tolist(), strict=True))
        for b in (resumed.batch(k) for k in range(start, resumed.num_batches))
    ] == whole[start:]


@given(cases() | weighted_cases(), st.data())
def test_batches_may_be_asked_in_any_order(case, data):
    plan, whole = case.plan(), samples_of(case.plan())
    for k in data.draw(st.permutations(range(plan.num_batches))):
        batch = plan.batch(k)
        assert list(zip(batch.shard.tolist(), batch.row.tolist(), strict=True)) == whole[k]


def test_epochs_and_seeds_differ_everywhere():
    case = Case([50] * 40, {}, OrderConfig(global_batch_size=32), 0)
    plans = [case.plan(), case.plan(epoch=1), case.plan(seed=1), case.plan(epoch=1, seed=1)]
    orders = [np.array(samples_of(plan)).reshape(-1, 2) for plan in plans]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).all(axis=1).mean() < 0.01


def test_a_batch_comes_from_all_over_the_dataset():
    case = Case([50] * 160, {}, OrderConfig(global_batch_size=64, num_streams=16), 0)
    batch = case.plan().batch(20)
    assert len(np.unique(batch.shard)) > 30  # of 16 streams x 4 shards in a block
    slots_of_a_stream = batch.shard.reshape(16, 4)
    assert max(len(set(shards)) for shards in slots_of_a_stream.tolist()) <= 4


def test_a_shard_is_shuffled_even_when_it_is_the_only_one():
    case = Case([640], {}, OrderConfig(global_batch_size=16, num_streams=4), 0)
    rows = np.concatenate([case.plan().batch(k).row for k in range(40)])
    assert (np.abs(np.diff(rows)) == 1).mean() < 0.05


@given(st.integers(1, 50), st.data())
def test_skip_excluded_numbers_the_rows_that_are_left(count, data):
    excluded = np.array(sorted(data.draw(st.sets(st.integers(0, count - 1)))), dtype=np.int64)
    left = [row for row in range(count) if row not in excluded]
    assert skip_excluded(np.arange(len(left)), excluded).tolist() == left


class TestWeights:
    MODALITIES = ("ct",) * 8 + ("fundus",) * 3 + ("oct",)

    def visits(self, weights: dict[str, float], epoch: int) -> np.ndarray:
        """How often an epoch reads each shard (of 10 samples)."""
        config = OrderConfig(global_batch_size=1, modality_weights=weights)
        plan = plan_epoch([10] * 12, None, config, epoch, modalities=self.MODALITIES)
        assert plan.num_batches == count_batches([10] * 12, None, config, epoch, modalities=self.MODALITIES)
        read = np.bincount([shard for batch in samples_of(plan) for shard, _ in batch], minlength=12)
        assert (read % 10 == 0).all()  # whole shards
        return read // 10

    def test_a_whole_number_repeats_all_shards(self):
        assert self.visits({"fundus": 2, "oct": 3}, 4).tolist() == [1] * 8 + [2] * 3 + [3]

    def test_zero_leaves_a_modality_out(self):
        assert self.visits({"ct": 0.0}, 0).tolist() == [0] * 8 + [1] * 4

    @pytest.mark.parametrize("weight", [0.25, 0.3, 0.75, 1.5, 2.7])
    def test_a_share_rotates_over_the_shards(self, weight):
        table = np.array([self.visits({"ct": weight}, epoch) for epoch in range(20)])
        assert (table[:, 8:] == 1).all()
        per_epoch = table[:, :8].sum(axis=1)
        assert set(per_epoch) <= {int(8 * weight), int(8 * weight) + 1}
        assert table[:, :8].max() - table[:, :8].min() <= 1  # none twice before all once
        in_all = table[:, :8].sum(axis=0)
        assert in_all.max() - in_all.min() <= 1
        assert in_all.sum() == int(20 * 8 * weight)

    def test_an_unknown_modality_is_named(self):
        with pytest.raises(ConfigError, match=r"'cta'.*allowed: ct, fundus, oct"):
            self.visits({"cta": 1.0}, 0)


def test_num_streams_is_the_largest_divisor_up_to_16():
    assert [choose_num_streams(g) for g in (1, 7, 16, 17, 24, 34, 4096)] == [1, 7, 16, 1, 12, 2, 16]
    assert choose_num_streams(4096, preferred=100) == 64


def test_streams_that_do_not_divide_the_batch():
    with pytest.raises(ConfigError, match=r"5 streams .* batch of 64.*4 or 8"):
        plan_epoch([100], None, OrderConfig(global_batch_size=64, num_streams=5), 0)


def test_less_than_one_batch():
    exclusions = {0: np.array([0, 1])}
    for function in (plan_epoch, count_batches):
        with pytest.raises(DataError, match=r"18 samples.*batch of 19.*at most 18"):
            function([10, 10], exclusions, OrderConfig(global_batch_size=19), 0)
    with pytest.raises(DataError, match="0 samples"):
        plan_epoch([], None, OrderConfig(global_batch_size=1), 0)


def test_batch_sizes_that_do_not_divide_name_what_would():
    with pytest.raises(ConfigError, match=r"batch of 64 .* 3 ranks x micro-batch 8.* 48 or 72$"):
        check_batch_sizes(64, 3, 8)
    with pytest.raises(
        ConfigError, match=r"batch of 64 .* 2 ranks x micro-batch 5.* 60 or 70, .*micro.* 2 or 4 or 8"
    ):
        check_batch_sizes(64, 2, 5)
    with pytest.raises(ConfigError, match=r"a global batch of 16, or a micro-batch of 1 or 2 or 4"):
        check_batch_sizes(8, 2, 8)


def test_batches_beyond_the_epoch():
    plan = plan_epoch([10], None, OrderConfig(global_batch_size=4), 0)
    for k, start, stop in ((2, 0, 4), (-1, 0, 4), (0, 3, 5), (0, 3, 2)):
        with pytest.raises(IndexError):
            plan.batch(k, start, stop)


def test_blocks_ahead_are_those_that_come_next():
    config = OrderConfig(global_batch_size=8, num_streams=4, block_shards=2, seed=3)
    plan = plan_epoch([5] * 40, {3: np.array([0, 4])}, config, 1)
    for world_size in (1, 2, 4):
        for rank in range(world_size):
            known: set[int] = set()
            begins: set[int] = set()
            for k in range(plan.num_batches):
                read = set(plan.rank_batch(k, rank, world_size).shard.tolist())
                begins = read if k == 0 else begins
                assert k < 6 or read <= known  # five batches read a block of two shards
                ahead = plan.blocks_ahead(k, rank, world_size)
                assert len(ahead) <= 4 // world_size
                assert all(1 <= len(shards) <= 2 for shards in ahead.values())
                known |= {shard for shards in ahead.values() for shard in shards}
            assert not begins <= known
            # of one stream, 10 shards in 5 blocks, all blocks but the first are announced
            assert 8 * 4 // world_size <= len(known) <= 9 * 4 // world_size
