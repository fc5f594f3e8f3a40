from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from frepa_dist.train.failures import translate
from shards.support.errors import DataError, EnvironmentFault


def test_no_memory_says_what_to_make_smaller():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    for error in (raised.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")):
        shown, lost_peer = translate(error)
        assert isinstance(shown, EnvironmentFault)
        assert "micro_batch_size" in str(shown)
        assert not lost_peer


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
        dist.DistBackendError("NCCL communicator was aborted"),
        dist.DistNetworkError("The client socket has timed out"),
    ],
)
def test_a_lost_connection_is_the_end_of_another_rank(error):
    shown, lost_peer = translate(error)
    assert isinstance(shown, EnvironmentFault)
    assert "connection to another rank is lost" in str(shown)
    assert lost_peer


def test_errors_for_people_stay_and_bugs_are_none():
    error = DataError("bad")
    assert translate(error) == (error, False)
    assert translate(RuntimeError("shapes do not match")) == (None, False)


def test_a_loader_process_that_dies_is_no_bug_wherever_that_is_raised():
    for text in (
        "DataLoader worker (pid 7) is killed by signal: Killed. ",
        "DataLoader worker (pid(s) 7) exited",
    ):
        shown, lost_peer = translate(RuntimeError(text))
        assert isinstance(shown, EnvironmentFault)
        assert "a loader process died" in str(shown)
        assert not lost_peer
