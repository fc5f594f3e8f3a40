"""A checkpoint's thread, killed between any two things it does to the disk."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from frepa_dist.runs import LATEST, list_checkpoints
from frepa_dist.train.checkpoint import is_intact, newest_intact
from frepa_dist.train.checkpoint.files import Layout
from frepa_dist.train.checkpoint.folders import Retention, remove_remains
from frepa_dist.train.checkpoint.pieces import Trained
from frepa_dist.train.checkpoint.write import Job, Writer
from frepa_dist.train.engines import World


@pytest.fixture
def student():
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return SimpleNamespace(module=module, engine=SimpleNamespace(optimizer=optimizer), fixed={})


def make_writer(run, student, monkeypatch) -> Writer:
    """Of a single rank, which has nobody to agree with."""
    monkeypatch.setattr(Writer, "_agree", lambda _, report: [report])
    world = World(0, 0, 1, torch.device("cpu"))
    group: Any = None
    return Writer(run, world, group, student, Retention(last=2))


def make_job(student, step: int) -> Job:
    trained = Trained(student.module, student.engine.optimizer)
    pieces = {f"student/{name}@{start}": tensor for name, start, tensor in trained.stretches()}
    layout = Layout([(key, value.dtype, tuple(value.shape)) for key, value in pieces.items()])
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    for key, (offset, size) in layout.places.items():
        buffer[offset : offset + size].view(pieces[key].dtype).copy_(pieces[key])
    return Job(step, layout, buffer, {"step": step}, {}, None, time.perf_counter())


def write(writer: Writer, student, step: int) -> None:
    job = make_job(student, step)
    writer.run(job)
    assert job.crash is None
    assert job.report.kind == "done", job.report


def kill_at(moment: int, place: str) -> None:
    """SIGKILL this process before the moment-th time that it opens, makes, renames or removes something."""
    count = itertools.count()

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        touches = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
        if touches and place in str(arguments[0]) and next(count) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def test_killed_at_any_moment_what_is_listed_is_whole(tmp_path, student, monkeypatch):
    for moment in itertools.count():
        run = tmp_path / f"run-{moment}"
        writer = make_writer(run, student, monkeypatch)
        for step in (2, 4):
            write(writer, student, step)
        child = os.fork()
        if child == 0:
            kill_at(moment, str(run))
            writer.run(make_job(student, 6))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL)
        listed = [int(folder.name[5:]) for folder in list_checkpoints(run)]
        assert listed in ([2, 4], [2, 4, 6], [4, 6])
        assert all(is_intact(folder) for folder in list_checkpoints(run))
        found = newest_intact(run)
        assert found is not None
        remove_remains(run)
        for step in (6, 8):  # it goes on from what was found
            if step > int(found.name[5:]):
                write(writer, student, step)
        newest = list_checkpoints(run)[-1]
        assert [int(folder.name[5:]) for folder in list_checkpoints(run)] == [6, 8]
        assert (run / "checkpoints" / LATEST).read_text().strip() == newest.name
        assert {path.name for path in (run / "checkpoints").iterdir()} == {
            "latest",
            "step-00000006",
            "step-00000008",
        }
        weights = load_file(newest / "student.safetensors")
        assert torch.equal(weights["weight"], student.module.weight)
        if status == 0:
            break
    assert moment > 15, "it touches the disk more often than that"


def test_weights_that_are_not_finite_are_not_written(tmp_path, student, monkeypatch):
    writer = make_writer(tmp_path, student, monkeypatch)
    with torch.no_grad():
        student.module.bias[1] = torch.inf
    job = make_job(student, 2)
    writer.run(job)
    assert job.report.kind == "diverged"
    assert "student/master/bias is no longer finite after step 2" in job.report.message
    assert not list_checkpoints(tmp_path)
