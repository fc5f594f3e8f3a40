"""A process group of one rank in the test's own process, for what needs engines and no other rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from deepspeed.utils import groups

from cluster.launch import free_port
from frepa_dist.train.engines import World, process_group


@contextmanager
def one_rank() -> Iterator[World]:
    """One rank, with the CPU as its device also where there is a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_SIZE": str(os.cpu_count()),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "DS_ACCELERATOR": "cpu",
            "PATH": os.environ["PATH"],  # process_group changes it
        }.items():
            patch.setenv(name, value)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(groups, "_WORLD_GROUP", None)  # DeepSpeed keeps the one that another test file had
        with process_group() as world:
            yield world
