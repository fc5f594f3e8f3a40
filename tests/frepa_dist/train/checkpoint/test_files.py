"""Files of stretches of tensors: whoever wrote which, everyone reads all."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from frepa_dist.train.checkpoint.files import (
    Layout,
    TensorReader,
    file_checksum,
    join_state,
    rank_file,
    split_state,
    write_bytes,
)
from frepa_dist.train.checkpoint.pieces import share
from shards.support.errors import DataError


def write(folder, rank, tensors):
    layout = Layout([(key, value.dtype, tuple(value.shape)) for key, value in tensors.items()])
    content = np.zeros(layout.num_bytes, dtype=np.uint8)
    for key, (offset, size) in layout.places.items():
        content[offset : offset + size] = tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy()
    return write_bytes(folder / rank_file(rank), [layout.header, content])


def test_what_is_written_is_safetensors_with_the_checksum_it_states(tmp_path):
    tensors = {
        "byte": torch.arange(3, dtype=torch.uint8),
        "wide": torch.arange(5, dtype=torch.int64),
        "half": torch.randn(2, 3).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    written = write(tmp_path, 0, tensors)
    path = tmp_path / written.name
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(
        torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in read
    )
    assert written.size == path.stat().st_size
    assert written.crc32c == file_checksum(path)


@settings(max_examples=30, deadline=None)
@given(
    numel=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    readers=st.integers(1, 4),
)
def test_any_cut_is_read_in_any_other(tmp_path_factory, numel, cuts, readers):
    folder = tmp_path_factory.mktemp("cut")
    values = torch.randn(numel)
    edges = sorted({0, numel, *(cut for cut in cuts if cut < numel)})
    for rank, (start, stop) in enumerate(itertools.pairwise(edges)):
        # every rank also writes all of a tensor that all ranks hold alike
        write(folder, rank, {f"cut/w@{start}": values[start:stop], "step/w@0": torch.ones(1)})
    with TensorReader(folder) as reader:
        assert reader.names() == ["cut/w", "step/w"]
        parts = [
            reader.read("cut/w", numel, numel * rank // readers, numel * (rank + 1) // readers)
            for rank in range(readers)
        ]
        assert torch.equal(torch.cat(parts), values)
        assert reader.read("step/w", 1) == 1


@given(numel=st.integers(0, 50), size=st.integers(1, 7))
def test_ranks_share_what_all_hold_without_gap_or_overlap(numel, size):
    values = torch.arange(numel)
    parts = [part for rank in range(size) for part in share(iter([("w", 0, values)]), rank, size)]
    assert torch.equal(torch.cat([tensor for _, _, tensor in parts] or [values]), values)
    position = 0
    for _, start, tensor in parts:
        assert start == position
        position += len(tensor)
    assert position == numel


def test_what_is_missing_or_of_another_size_is_said(tmp_path):
    write(tmp_path, 0, {"w@0": torch.ones(4), "w@6": torch.ones(2)})
    with TensorReader(tmp_path) as reader:
        with pytest.raises(DataError, match="'w' lacks numbers from 4"):
            reader.read("w", 8)
        with pytest.raises(DataError, match="holds 8 numbers of 'w', expected 9"):
            reader.read("w", 9)
        with pytest.raises(DataError, match="holds 0 numbers of 'other', expected 1"):
            reader.read("other", 1)
        assert torch.equal(reader.read("w", 8, 6), torch.ones(2))


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_a_pickle_in_the_place_of_tensors_is_refused_and_not_run(tmp_path, capsys):
    torch.save(Evil(), tmp_path / rank_file(0))
    with pytest.raises(DataError, match="cannot be read"):
        TensorReader(tmp_path)
    assert capsys.readouterr().out == ""


def test_deepspeed_refuses_a_pickle_too(tmp_path, monkeypatch, capsys):
    """Nothing of ours reads DeepSpeed's files; should something, this is how every rank is started."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    torch.save(Evil(), tmp_path / "mp_rank_00_model_states.pt")
    engine = TorchCheckpointEngine()
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        engine.load(str(tmp_path / "mp_rank_00_model_states.pt"), map_location="cpu")
    assert "run" not in capsys.readouterr().out.split()


def test_nested_state_survives(tmp_path):
    state = {"step": 3, "list": [1, {"x": torch.arange(6).view(2, 3)}], "none": None, "x": torch.tensor(1.5)}
    tensors: dict[str, torch.Tensor] = {}
    tree = json.loads(json.dumps(split_state(state, "state", tensors)))
    write(tmp_path, 0, {f"{name}@0": value for name, value in tensors.items()})
    with TensorReader(tmp_path) as reader:
        again = join_state(tree, reader)
    assert torch.equal(again["list"][1].pop("x"), state["list"][1].pop("x"))
    assert torch.equal(again.pop("x"), state.pop("x"))
    assert again == state
