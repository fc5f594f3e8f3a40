"""How modalities are balanced: the shares that were asked for, by whole shards, over several epochs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shards.read.balance import ModalityWeights, passes_by_modality
from shards.read.draws import draw_key, sample_rng
from shards.read.order import OrderConfig, Slots, count_batches, plan_epoch
from shards.support.errors import ConfigError
from shards.support.settings import parse_yaml, validate

sizes = st.dictionaries(
    st.sampled_from(["ct", "mri", "xray", "oct", "fundus"]), st.integers(1, 10**8), min_size=1
)


class TestPasses:
    def test_uniform_reads_each_modality_equally_often_in_an_epoch_of_the_dataset_s_length(self):
        assert passes_by_modality("uniform", {"ct": 800, "mri": 150, "oct": 50}) == {
            "ct": pytest.approx(1000 / 3 / 800, abs=1e-6),
            "mri": pytest.approx(1000 / 3 / 150, abs=1e-6),
            "oct": pytest.approx(1000 / 3 / 50, abs=1e-6),
        }

    def test_alpha_goes_by_the_power_of_the_size(self):
        passes = passes_by_modality({"alpha": 0.5}, {"ct": 900, "oct": 100})
        assert passes == {"ct": pytest.approx(750 / 900, abs=1e-6), "oct": 2.5}  # shares 30 : 10

    @given(sizes, st.floats(0, 1))
    def test_whatever_the_balance_the_epoch_is_as_long_as_the_dataset(self, num, alpha):
        passes = passes_by_modality({"alpha": alpha}, num)
        total = sum(num.values())
        assert sum(passes[name] * n for name, n in num.items()) == pytest.approx(total, rel=1e-4)
        parts = {name: n**alpha for name, n in num.items()}
        for name, n in num.items():
            share = passes[name] * n / total
            assert share == pytest.approx(parts[name] / sum(parts.values()), rel=1e-4)
            assert passes[name] >= 0.9 / len(num)

    @given(sizes)
    def test_the_ends_are_uniform_and_by_size(self, num):
        assert passes_by_modality({"alpha": 0}, num) == passes_by_modality("uniform", num)
        assert set(passes_by_modality({"alpha": 1}, num).values()) == {1.0}

    def test_a_modality_of_which_all_is_excluded_gets_no_share(self):
        assert passes_by_modality("uniform", {"ct": 60, "mri": 0, "oct": 60}) == {"ct": 1, "mri": 0, "oct": 1}
        assert passes_by_modality("uniform", {"ct": 0}) == {"ct": 0}

    def test_one_is_left_out_and_the_others_are_balanced(self):
        num = {"ct": 900, "oct": 100, "fundus": 5000}
        assert passes_by_modality({"alpha": 0.5, "fundus": 0}, num) == {
            **passes_by_modality({"alpha": 0.5}, {"ct": 900, "oct": 100}),
            "fundus": 0,
        }
        with pytest.raises(ConfigError, match=r"modality_weights: .*'cta'"):
            passes_by_modality({"alpha": 0, "cta": 0}, num)

    def test_by_name_is_what_it_says_and_an_unknown_one_is_named(self):
        assert passes_by_modality({"oct": 3}, {"ct": 60, "oct": 6}) == {"ct": 1, "oct": 3}
        with pytest.raises(ConfigError, match=r"modality_weights: .*'cta'.*allowed: ct, oct"):
            passes_by_modality({"oct": 1, "cta": 3}, {"oct": 60, "ct": 6})


GOOD = ["uniform", "{alpha: 0}", "{alpha: 0, ct: 0}", "{alpha: 0.5}", "{alpha: 1}", "{ct: 0, mri: 2.5}", "{}"]
BAD = {
    "by size": "take `uniform`, `{alpha: A}`.*or passes by modality",
    "2": "take `uniform`",
    "[ct, mri]": "take `uniform`",
    "{alpha: 1.5}": "'alpha' is 1.5, more than 1",
    "{alpha: -0.5}": "'alpha' is -0.5, no number from 0 on",
    "{alpha: 0.5, ct: 1, mri: 0}": "'alpha' balances all modalities, so 'ct' cannot",
    "{ct: -1}": "'ct' is -1, no number",
    "{ct: .nan}": "'ct' is nan, no number",
    "{ct: .inf}": "'ct' is inf, no number",
    "{ct: true}": "'ct' is True, no number",
    "{ct: often}": "'ct' is 'often', no number",
}


@pytest.mark.parametrize("text", GOOD)
def test_what_can_be_asked_is_kept_as_it_was_given(text):
    config = OrderConfig(global_batch_size=1, modality_weights=parse_yaml(text))
    assert config.model_dump(mode="json")["modality_weights"] == parse_yaml(text)


@pytest.mark.parametrize("text", BAD)
def test_what_cannot_be_asked_is_explained(text):
    with pytest.raises(ConfigError, match=f"'modality_weights': .*{BAD[text]}"):
        validate(
            OrderConfig, {"global_batch_size": 1, "modality_weights": parse_yaml(text)}, where="run.yaml"
        )


@dataclass
class Dataset:
    counts: list[int]
    modalities: list[str]
    exclusions: dict[int, np.ndarray]

    def kept(self) -> dict[str, int]:
        kept = dict.fromkeys(self.modalities, 0)
        for shard, (modality, count) in enumerate(zip(self.modalities, self.counts, strict=True)):
            kept[modality] += count - len(self.exclusions.get(shard, ()))
        return kept

    def epoch(self, weights: ModalityWeights, epoch: int, seed: int = 0) -> Slots:
        """Return all samples of an epoch, as one batch."""
        config = OrderConfig(global_batch_size=1, modality_weights=weights, seed=seed)
        arguments = (self.counts, self.exclusions)
        num = count_batches(*arguments, config, epoch, modalities=self.modalities)
        whole = config.model_copy(update={"global_batch_size": num})
        plan = plan_epoch(*arguments, whole, epoch, modalities=self.modalities)
        assert plan.num_batches == 1
        return plan.batch(0)


@st.composite
def datasets(draw) -> Dataset:
    shards = st.tuples(st.integers(1, 40), st.sampled_from(["ct", "mri", "oct"]))
    counts, modalities = zip(*draw(st.lists(shards, min_size=1, max_size=12)), strict=True)
    exclusions = {}
    for shard in draw(st.sets(st.integers(0, len(counts) - 1), max_size=3)):
        rows = draw(st.sets(st.integers(0, counts[shard] - 1), min_size=1))
        exclusions[shard] = np.array(sorted(rows), dtype=np.int64)
    dataset = Dataset(list(counts), list(modalities), exclusions)
    assume(sum(dataset.kept().values()))
    return dataset


@given(datasets(), st.floats(0, 1), st.integers(1, 12), st.integers(0, 2**40))
def test_over_epochs_the_shares_come_to_what_was_asked(dataset, alpha, num_epochs, seed):
    weights = "uniform" if alpha == 0 else {"alpha": alpha}
    epochs = [dataset.epoch(weights, epoch, seed) for epoch in range(num_epochs)]
    read = np.bincount(np.concatenate([e.shard for e in epochs]), minlength=len(dataset.counts))
    kept = dataset.kept()
    parts = {name: n**alpha for name, n in kept.items() if n}
    for name, n in kept.items():
        got = sum(read[shard] for shard, own in enumerate(dataset.modalities) if own == name)
        asked = num_epochs * sum(kept.values()) * parts.get(name, 0) / sum(parts.values())
        # no more than one walk around the modality's shards is open, however many epochs there were
        assert abs(got - asked) <= n * (1 + 1e-6 * num_epochs)
    for shard, count in enumerate(dataset.counts):  # nothing excluded, and all rows of a shard equally often
        rows = np.concatenate([e.row[e.shard == shard] for e in epochs])
        times = np.bincount(rows, minlength=count)
        excluded = dataset.exclusions.get(shard, np.zeros(0, dtype=np.int64))
        assert not times[excluded].any()
        assert len(set(np.delete(times, excluded).tolist())) <= 1


def test_a_single_tiny_shard_is_read_as_often_as_a_hundred_large_ones():
    dataset = Dataset([50] * 100 + [2], ["ct"] * 100 + ["oct"], {})
    for epoch in range(3):
        slots = dataset.epoch("uniform", epoch)
        is_oct = slots.shard == 100
        assert len(slots.shard) == pytest.approx(5002, abs=51)  # to a shard
        assert is_oct.sum() == pytest.approx(2501, abs=2)
        # the two samples of the shard are spread over the epoch, not read in one run
        assert np.diff(np.flatnonzero(is_oct)).max() < 1000
    assert np.bincount(slots.row[is_oct]).tolist() == [is_oct.sum() // 2] * 2


def test_a_sample_that_comes_again_has_another_place_and_so_other_draws():
    slots = Dataset([50, 2], ["ct", "oct"], {}).epoch("uniform", 1)
    again = slots.position[(slots.shard == 1) & (slots.row == 0)].tolist()
    assert len(again) > 10
    assert len({draw_key(0, 1, position) for position in again}) == len(again)
    assert len({sample_rng(0, 1, position, "crop").random() for position in again}) == len(again)


def test_the_epoch_goes_by_what_is_left_after_exclusions():
    dataset = Dataset([100, 100], ["ct", "oct"], {0: np.arange(80)})  # 20 and 100 are left
    epochs = np.concatenate([dataset.epoch("uniform", epoch).shard for epoch in range(10)])
    assert np.bincount(epochs).tolist() == [600, 600]
