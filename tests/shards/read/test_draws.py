"""Draws are a function of their key, and no two keys share numbers."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np

from shards.read.draws import sample_rng

KEYS = list(itertools.product((0, 1, 2**63 - 1), (0, 1, 900), (0, 1, 2**40), ("crop", "mask")))


def test_same_key_same_numbers():
    for key in KEYS:
        np.testing.assert_array_equal(sample_rng(*key).random(100), sample_rng(*key).random(100))


def test_any_part_of_the_key_changes_the_numbers():
    # 2000 values of each: a stream that were a shifted copy of another one would share its values
    drawn = [sample_rng(*key).integers(2**63, size=2000) for key in KEYS]
    assert len(np.unique(np.concatenate(drawn))) == 2000 * len(KEYS)


def test_neighbors_are_independent():
    table = np.stack([sample_rng(0, 0, position, "mask").random(64) for position in range(2000)])
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.01
    assert abs(table.mean() - 0.5) < 0.005


def test_other_processes_draw_the_same():
    # Python's own hash of a string differs from process to process
    code = "from shards.read.draws import sample_rng; print(sample_rng(3, 1, 4, 'crop').integers(2**63))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) == sample_rng(3, 1, 4, "crop").integers(2**63)


def test_numbers_are_those_of_the_first_version():
    # a resumed run continues with these: a change here breaks the runs of those who update
    assert sample_rng(0, 0, 0, "crop").integers(1000, size=4).tolist() == [283, 25, 614, 327]
