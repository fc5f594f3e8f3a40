"""What a checkpoint's thread does: write, agree with the other ranks' threads, and make it the latest."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from frepa_dist.journal import append_event
from frepa_dist.runs import CHECKPOINTS, LATEST, MANIFEST, STUDENT_WEIGHTS, checkpoint_name
from frepa_dist.train.checkpoint.copies import Copies
from frepa_dist.train.checkpoint.files import Layout, TensorReader, Written, rank_file, write_bytes, writing
from frepa_dist.train.checkpoint.folders import PARTIAL, Retention, remove_checkpoint
from frepa_dist.train.checkpoint.pieces import MASTER, engine_parts
from frepa_dist.train.checkpoint.resume import STATE
from frepa_dist.train.engines import EngineSubmodule, World
from shards.stores.atomic import replace_text, sync_folder
from shards.support.errors import DivergedError, EnvironmentFault


class Report(NamedTuple):
    """How a rank fared with a part of a checkpoint: `done`, `disk`, `diverged` or `bug`, and in words."""

    kind: str = "done"
    message: str = ""
    file: Written | None = None


@dataclass
class Job:
    """A checkpoint that is being written.

    Attributes:
        step: optimizer steps it is after.
        layout: of the rank's file.
        buffer: what is written behind its header, (layout.num_bytes,) uint8 in the host's memory.
        state: content of state.json.
        metrics: logged values that checkpoints may be kept by.
        copied: when the copies to `buffer` are done, where a device makes them by and by.
        started: when training came to a halt for it.
        waited_seconds: how long training waited.
        is_doubtful: whether the state may be why steps before it were skipped.
        report: how it went, equal on all ranks, once the thread has ended.
        crash: what ended the thread otherwise.
    """

    step: int
    layout: Layout
    buffer: Tensor
    state: dict[str, Any]
    metrics: dict[str, float]
    copied: torch.cuda.Event | None
    started: float
    waited_seconds: float = 0.0
    is_doubtful: bool = False
    report: Report = field(default_factory=Report)
    crash: BaseException | None = None


class Writer:
    """Writes checkpoints in a thread of each rank.

    Args:
        run_dir: the run folder.
        world: this rank among the others.
        group: of all ranks, on gloo, which only these threads use.
        student: whose weights are written once more, whole.
        retention: which checkpoints stay when one has come.
        copies: where a second copy goes; None: nowhere.
        heard: is told, by the thread, of each checkpoint that was written or could not be.
    """

    def __init__(
        self,
        run_dir: Path,
        world: World,
        group: dist.ProcessGroup,
        student: EngineSubmodule,
        retention: Retention,
        copies: Copies | None = None,
        heard: Callable[[Job], None] | None = None,
    ) -> None:
        self._copies, self._heard = copies, heard
        self._run_dir, self._world, self._group, self._retention = run_dir, world, group, retention
        self._shapes, self._fixed = engine_parts(student).shapes(), student.fixed

    def run(self, job: Job) -> None:
        """Write the checkpoint; what went wrong is left in the job."""
        try:
            if self._world.device.type == "cuda":  # a new thread is on the first
                torch.cuda.set_device(self._world.device)
            job.report = self._write(job)
            if self._heard is not None:
                self._heard(job)
        except BaseException as error:  # raised again where training waits for it
            job.crash = error

    def _agree(self, report: Report) -> list[Report]:
        """All ranks' reports, in rank order."""
        reports: list[Any] = [None] * self._world.size
        dist.all_gather_object(reports, report, group=self._group)
        return [Report(*entry) for entry in reports]

    def _write(self, job: Job) -> Report:
        """Write the checkpoint with the threads of the other ranks; the outcome is equal on all."""
        final = self._run_dir / CHECKPOINTS / checkpoint_name(job.step)
        partial = final.with_name(f"{PARTIAL}{final.name}")
        reports = self._agree(attempt(lambda: self._open(partial)) if self._world.is_main else Report())
        if all(report.kind == "done" for report in reports):
            reports = self._agree(attempt(lambda: self._write_own(job, partial)))
        if all(report.kind == "done" for report in reports):
            files = [report.file for report in reports if report.file is not None]
            own = (
                attempt(lambda: self._commit(job, partial, final, files)) if self._world.is_main else Report()
            )
            reports = self._agree(own)
        failed = [(rank, report) for rank, report in enumerate(reports) if report.kind != "done"]
        if not failed:
            return Report()
        if self._world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        # what will not pass by itself goes first
        rank, worst = min(failed, key=lambda entry: ("bug", "diverged", "disk").index(entry[1].kind))
        message = f"rank {rank}: {worst.message}"
        if self._world.is_main:
            print(f"frepa: no checkpoint of step {job.step}: {message}", file=sys.stderr, flush=True)
            # where the disk is full this may fail too
            attempt(lambda: append_event(self._run_dir, "checkpoint_failed", step=job.step, error=message))
        return Report(worst.kind, message)

    def _open(self, partial: Path) -> None:
        with writing(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def _write_own(self, job: Job, partial: Path) -> Written:
        """Write this rank's file."""
        if job.copied is not None:
            job.copied.synchronize()
        content = job.buffer.numpy()
        check_finite(content, job.layout, job.state["step"])
        path = partial / rank_file(self._world.rank)
        with writing(path):
            return write_bytes(path, [job.layout.header, content])

    def _commit(self, job: Job, partial: Path, final: Path, files: list[Written]) -> None:
        """Rank 0: write what is there once, then the manifest, and give the folder its name."""
        for file in files:
            self._check_shared(partial / file.name, file)
        with writing(partial):
            state = json.dumps(job.state, indent=1).encode()
            files = [*files, write_bytes(partial / STATE, [state]), self._write_student(partial)]
            entries = {file.name: {"size": file.size, "crc32c": file.crc32c} for file in files}
            manifest = {"step": job.step, "metrics": job.metrics, "files": entries}
            manifest |= {"doubtful": True} if job.is_doubtful else {}
            replace_text(partial / MANIFEST, json.dumps(manifest, indent=1))
            if final.exists():
                remove_checkpoint(final)  # a damaged one that the run was resumed past
            partial.rename(final)
            sync_folder(final.parent)
            replace_text(final.parent / LATEST, final.name + "\n")
        # the checkpoint is there: what fails from here on does not undo it
        attempt(lambda: self._retention.apply(self._run_dir))
        attempt(
            lambda: append_event(
                self._run_dir,
                "checkpoint",
                step=job.step,
                bytes=sum(file.size for file in files),
                seconds=round(time.perf_counter() - job.started, 3),
                waited_seconds=round(job.waited_seconds, 3),
            )
        )
        if self._copies is not None:
            self._copies.send()

    def _check_shared(self, path: Path, file: Written) -> None:
        size = path.stat().st_size if path.is_file() else 0
        if size != file.size:
            raise EnvironmentFault(
                f"{size} of {file.size} bytes are there: the nodes do not share this folder",
                where=path,
                fix="put `output` on storage that all nodes mount",
            )

    def _write_student(self, partial: Path) -> Written:
        """Put the student's weights together from what all ranks wrote; one tensor in memory at a time."""
        shapes = {**self._shapes, **{name: tuple(value.shape) for name, value in self._fixed.items()}}
        layout = Layout([(name, torch.float32, shape) for name, shape in shapes.items()])

        def parts(reader: TensorReader) -> Iterator[np.ndarray[Any, Any] | bytes]:
            yield layout.header
            for name in layout.places:
                value = self._fixed.get(name)
                if value is None:
                    value = reader.read(
                        f"student/{MASTER}/{name}", int(np.prod(shapes[name], dtype=np.int64))
                    )
                yield value.contiguous().view(-1).view(torch.uint8).numpy()

        with TensorReader(partial) as reader:
            return write_bytes(partial / STUDENT_WEIGHTS, parts(reader))


def attempt(action: Callable[[], Any]) -> Report:
    """Do something and say how it went, for ranks must go on to where they agree."""
    try:
        result = action()
    except EnvironmentFault as error:
        return Report("disk", f"{error.where}: {error.what}")
    except OSError as error:
        return Report("disk", str(error))
    except DivergedError as error:
        return Report("diverged", error.what)
    except Exception as error:  # told to all ranks, and raised there
        return Report("bug", f"{type(error).__name__}: {error}")
    return Report(file=result if isinstance(result, Written) else None)


def check_finite(content: np.ndarray[Any, Any], layout: Layout, step: int) -> None:
    """Make sure that weights and moments are finite; numpy, for torch would take training's threads.

    Raises:
        DivergedError: they are not; the checkpoint would be of no use.
    """
    described = json.loads(layout.header[8:])
    for key, (offset, size) in layout.places.items():
        if described[key]["dtype"] == "F32" and not key.startswith("state/") and size:
            values = content[offset : offset + size].view(np.float32)
            if not (np.isfinite(values.min()) and np.isfinite(values.max())):
                name = key.rpartition("@")[0]
                raise DivergedError(
                    f"{name} is no longer finite after step {step}, so no checkpoint was made"
                )
