"""The table of modalities."""

from __future__ import annotations

import pytest

from shards.hf_tokens import HFParams
from shards.modalities import MODALITIES, find_modality
from shards.schema import SourceBuild
from shards.support.errors import ConfigError


def test_the_nine_modalities_have_names_that_fit_the_format():
    assert len(MODALITIES) == 9
    for name, modality in MODALITIES.items():
        assert modality.name == name
        SourceBuild(modality=name, source="a", counts={}, plan_digest="", settings={})


def test_fundus_follows_the_paper():
    assert find_modality("fundus").hf == HFParams(
        channel="green", background_sigma=0.04, cutoff_cycles=13.4, order=2
    )


def test_modalities_that_differ_have_digests_that_differ():
    digests = {name: modality.hf.digest() for name, modality in MODALITIES.items()}
    assert digests["fundus"] != digests["histopathology"]
    assert digests["fundus"] == digests["endoscopy"]


def test_an_unknown_modality_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"petscan.*fundus, ct, mri"):
        find_modality("petscan")
