"""Checkpoints: taken between two steps, written beside training, made `latest` in one step.

What a rank holds is copied to its host's memory, which is all that training waits for; a thread writes it,
while training goes on. Nothing of DeepSpeed runs in that thread, and no communication of training's: the
threads of all ranks agree among themselves, on a gloo group of their own. A checkpoint folder holds

rank-R.safetensors    what rank R held: stretches of master weights, moments, teachers, random state
state.json            place in the data, the run's configuration, what it was computed with
student.safetensors   full fp32 weights of the student, what evaluation and export read
manifest.json         size and crc32c of every file; written last, it makes the folder a checkpoint
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from frepa_dist.config import RunConfig
from frepa_dist.journal import append_event
from frepa_dist.train.checkpoint.copies import Copies
from frepa_dist.train.checkpoint.files import Layout, split_state
from frepa_dist.train.checkpoint.folders import Retention, remove_remains
from frepa_dist.train.checkpoint.pieces import replicated_stretches, stretches_of
from frepa_dist.train.checkpoint.resume import FORMAT
from frepa_dist.train.checkpoint.write import Job, Writer
from frepa_dist.train.engines import World
from frepa_dist.train.records import describe_environment
from frepa_dist.train.submodules import Submodules
from shards.support.errors import DivergedError, EnvironmentFault


class Checkpoints:
    """Writes a run's checkpoints; all ranks must make one, and call each function in the same order.

    Ranks on several nodes need the run folder on storage that they share.

    Args:
        config: of the run.
        run_dir: the run folder.
        submodules: the networks.
        world: this rank among the others.
        snapshot: hash of the dataset's snapshot.
        heard: is told, by another thread, of each checkpoint that was written or could not be.

    Attributes:
        waited_seconds: how long training waited for checkpoints so far.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        submodules: Submodules,
        world: World,
        snapshot: str,
        heard: Callable[[Job], None] | None = None,
    ) -> None:
        train = config.train
        self._run_dir, self._submodules, self._world = run_dir, submodules, world
        best = train.keep_best
        self.retention = Retention(
            last=train.keep_checkpoints,
            every=train.keep_every,
            metric=best and best.lstrip("-"),
            largest=bool(best) and str(best).startswith("-"),
        )
        self._failures_allowed, self._failures = train.checkpoint_failures, 0
        self._facts = {"format": FORMAT, "snapshot": snapshot, "config": config.model_dump(mode="json")}
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)  # this rank is in it
        place = train.checkpoint_copy
        self._copies = Copies(place, run_dir, self.retention) if place is not None and world.is_main else None
        self._writer = Writer(run_dir, world, group, submodules.student, self.retention, self._copies, heard)
        self._buffer: Tensor | None = None
        self._job: Job | None = None
        self._thread: Thread | None = None
        self._has_told = False
        self.waited_seconds = 0.0
        if world.is_main:
            remove_remains(run_dir)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
        *,
        is_doubtful: bool = False,
    ) -> None:
        """Take a checkpoint after `step` steps; it is written while training goes on.

        Args:
            step: optimizer steps so far.
            state: nested dicts and lists of tensors and of what JSON knows, equal on all ranks.
            metrics: the latest logged values; empty where none were logged yet.
            is_doubtful: whether the last steps were skipped, for which this state may be the cause.

        Raises:
            DivergedError: weights of the checkpoint before are not finite.
            EnvironmentFault: as many checkpoints in a row as are allowed could not be written.
        """
        began = time.perf_counter()
        self._settle(last=False)
        self._job = self._take(step, state, self._known(step, metrics or {}), began)
        self._job.is_doubtful = is_doubtful
        self._job.waited_seconds = time.perf_counter() - began
        self._thread = Thread(target=self._writer.run, args=(self._job,), name="checkpoint", daemon=True)
        self._thread.start()
        self.waited_seconds += time.perf_counter() - began

    def settle(self) -> None:
        """Wait until the checkpoint that is being written is there, before a run goes back to one.

        That its weights are not finite is why a run goes back, and no error.

        Raises:
            EnvironmentFault: as `save`.
        """
        with contextlib.suppress(DivergedError):
            self._settle(last=False)

    def finish(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            DivergedError: its weights are not finite.
            EnvironmentFault: it could not be written.
        """
        began = time.perf_counter()
        self._settle(last=True)
        self.waited_seconds += time.perf_counter() - began

    def copy(self) -> None:
        """Copy what is not yet in the second place, where there is one, while training goes on."""
        if self._copies is not None:
            self._copies.send()

    def wait_for_copies(self) -> None:
        """On rank 0: wait until copies are made, or have failed."""
        if self._copies is not None:
            self._copies.finish()

    def _known(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The value that checkpoints are kept by, where it was logged: a term may rest for a while."""
        name = self.retention.metric
        if name is None or not metrics:
            return {}
        if name in metrics:
            return {name: float(metrics[name])}
        if self._world.is_main and not self._has_told:
            self._has_told = True
            append_event(self._run_dir, "keep_best_unknown", step=step, metric=name, logged=sorted(metrics))
            print(
                f"frepa: train.keep_best: '{name}' was not logged up to step {step}; logged were: "
                f"{', '.join(sorted(metrics))}",
                file=sys.stderr,
            )
        return {}

    def _settle(self, *, last: bool) -> None:
        """Wait for the thread, and take its failure as all ranks do."""
        if self._thread is None or self._job is None:
            return
        self._thread.join()
        job, self._thread, self._job = self._job, None, None
        if job.crash is not None:
            raise job.crash
        kind, message, _ = job.report
        if kind == "done":
            self._failures = 0
        elif kind == "disk":
            self._failures += 1
            if last or self._failures >= self._failures_allowed:
                raise EnvironmentFault(
                    f"{self._failures} checkpoint(s) in a row could not be written, the last: {message}",
                    where=self._run_dir,
                    fix="free disk space or make the folder writable, then `frepa resume` the run",
                )
        elif kind == "diverged":
            raise DivergedError(
                message,
                where=self._run_dir,
                fix="start a new run with a lower learning rate or loss weight; checkpoints before stay",
            )
        else:
            raise RuntimeError(message)

    def _take(self, step: int, state: Mapping[str, Any], metrics: dict[str, float], began: float) -> Job:
        """Copy what this rank holds to the host; no wait for an accelerator."""
        tensors: dict[str, Tensor] = {}
        tree = split_state(dict(state), "state", tensors)
        own = tensors if self._world.is_main else {}
        sizes = {}
        for name, value in self._random_state().items():
            sizes[name] = len(value)
            own[f"random/{self._world.rank}/{name}"] = value
        pieces = {
            f"{name}@{start}": tensor
            for source in (
                stretches_of(self._submodules, self._world.rank, self._world.size),
                replicated_stretches(own),
            )
            for name, start, tensor in source
        }
        layout = Layout([(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in pieces.items()])
        buffer, copied = self._copy(pieces, layout)
        document = {
            **self._facts,
            "step": step,
            "world_size": self._world.size,
            "random_sizes": sizes,
            "environment": describe_environment(self._world),
            # as JSON now: what it was made of goes on changing
            "state": json.loads(json.dumps(tree)),
        }
        return Job(step, layout, buffer, document, metrics, copied, began)

    def _random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self._world.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._world.device)
        return state

    def _copy(self, pieces: Mapping[str, Tensor], layout: Layout) -> tuple[Tensor, torch.cuda.Event | None]:
        """Copy tensors to where the layout puts them, in memory that is used again each time."""
        on_cuda = self._world.device.type == "cuda"
        if self._buffer is None or len(self._buffer) < layout.num_bytes:
            self._buffer = None  # first, or both would be held
            self._buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, pin_memory=on_cuda)
        for key, tensor in pieces.items():
            offset, size = layout.places[key]
            target = self._buffer[offset : offset + size].view(tensor.dtype)
            target.copy_(tensor, non_blocking=True)
        if not on_cuda:
            return self._buffer[: layout.num_bytes], None
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # later work of the stream changes weights only when the copies before it are done
        copied.record()
        return self._buffer[: layout.num_bytes], copied
