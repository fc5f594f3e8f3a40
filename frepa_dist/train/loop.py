"""The training loop. It knows submodules and named losses, and no method by name."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frepa_dist.config import RunConfig
from frepa_dist.methods.base import StepInfo
from frepa_dist.methods.registry import create_method
from frepa_dist.runs import METRICS
from frepa_dist.train.checkpoint import load_checkpoint, save_checkpoint
from frepa_dist.train.engines import World
from frepa_dist.train.records import Averages, PhaseTimer, append_event, append_line, truncate_metrics
from frepa_dist.train.schedule import learning_rate, opponent_learning_rate
from frepa_dist.train.step import Batch, Stepper
from frepa_dist.train.stop import Control
from frepa_dist.train.submodules import Submodules
from shards.read.order import check_batch_sizes
from shards.read.stream import MicroBatch, SampleStream
from shards.support.errors import ConfigError, DivergedError
from shards.support.progress import Progress
from shards.support.telemetry import Telemetry


class Trainer:
    """One run on this rank: build, resume, train.

    Args:
        config: the resolved configuration.
        run_dir: the run folder, shared by all ranks.
        world: this rank among the others.
        telemetry: where live metrics are shown.
        control: who may ask this rank to stop; None is never asked.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        world: World,
        telemetry: Telemetry,
        control: Control | None = None,
    ) -> None:
        self.config, self.run_dir, self.world, self.telemetry = config, run_dir, world, telemetry
        self.control = control or Control()
        train = config.train
        accumulation = check_batch_sizes(train.global_batch_size, world.size, train.micro_batch_size)
        self.stream = SampleStream(
            config.stream_config(), config.order_config(), world.rank, world.size, train.micro_batch_size
        )
        dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        self.method = create_method(config.method, compute_dtype=dtype)
        self.submodules = Submodules(self.method, train, accumulation, world)
        self.total_steps = train.steps or self._steps_of(train.epochs or 0)
        self.step = self.epoch = self.batches_applied = 0
        self.timer, self.averages = PhaseTimer(), Averages()
        self.stepper = Stepper(self.method, self.submodules, world, self.timer, self.averages)
        self._logged_at, self._logged_step = time.perf_counter(), 0

    def _steps_of(self, epochs: int) -> int:
        return sum(self.stream.num_batches(epoch) for epoch in range(epochs))

    def resume(self, checkpoint: Path) -> None:
        """Go back to a checkpoint: weights, optimizers, schedules, random state, place in the data."""
        state = load_checkpoint(checkpoint, self.submodules, self.world)
        if state["snapshot"] != self.stream.snapshot.hash:
            raise ConfigError("the checkpoint was trained on another snapshot", where=checkpoint)
        self.method.load_state_dict(state["method"])
        self.step, self.epoch = state["step"], state["epoch"]
        self.batches_applied = state["batches_applied"]
        self._logged_step = self.step
        if self.world.is_main:
            truncate_metrics(self.run_dir, self.step)

    def run(self) -> None:
        """Train to the end of the schedule, or until asked to stop; all ranks must call it.

        Raises:
            DivergedError: a loss is no longer finite.
        """
        silent = not self.world.is_main
        with Progress(
            self.total_steps, "pretrain", unit="step", initial=self.step, silent=silent
        ) as progress:
            self._logged_at = time.perf_counter()
            while self.step < self.total_steps and not self.control.agreed:
                self._run_epoch(progress)
                self.epoch, self.batches_applied = self.epoch + 1, 0

    def _run_epoch(self, progress: Progress) -> None:
        train = self.config.train
        batches = iter(self.stream.batches(self.epoch, self.batches_applied))
        while self.step < self.total_steps:
            with self.timer.phase("data"):
                micro_batches = next(batches, None)
                if micro_batches is None:
                    return
                on_device = [self.to_device(batch) for batch in micro_batches]
            info = StepInfo(step=self.step, total_steps=self.total_steps, seed=train.seed)
            self.stepper.run(on_device, info)
            self.step, self.batches_applied = self.step + 1, self.batches_applied + 1
            note = ""
            if self.step % train.log_every == 0 or self.step == self.total_steps:
                note = self._log()
            stop = self.control.after_step(self.step)
            if stop or self.step % train.checkpoint_every == 0 or self.step == self.total_steps:
                with self.timer.phase("checkpoint"):
                    self.save()
            progress.update(note=note)
            if stop:
                return

    def to_device(self, batch: MicroBatch) -> Batch:
        """Move a micro-batch to where this rank computes; samples that were skipped are written down."""
        for skipped in batch["skipped"]:
            append_event(self.run_dir, "sample_skipped", step=self.step, **skipped)
        if self.config.data.bad_samples == "skip":
            share = len(batch["skipped"]) / len(batch["key"])
            self.averages.add({"data/skipped": torch.full((), share, device=self.world.device)})
        return {
            name: value.to(self.world.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def _log(self) -> str:
        """Read the means, write a line, and return a few words for the progress bar."""
        means = self.averages.take(self.world)
        bad = sorted(name for name, value in means.items() if not math.isfinite(value))
        if bad:  # means are equal on all ranks, so all of them leave here together
            raise DivergedError(
                f"{', '.join(bad)} no longer finite between steps {self._logged_step} and {self.step}",
                where=self.run_dir,
                fix="start a new run with a lower learning rate or loss weight; checkpoints before stay",
            )
        now = time.perf_counter()
        steps, seconds = self.step - self._logged_step, now - self._logged_at
        self._logged_at, self._logged_step = now, self.step
        batch = self.config.train.global_batch_size
        record: dict[str, Any] = {
            "step": self.step,
            "epoch": self.epoch,
            "samples": self.step * batch,
            **means,
            "lr": learning_rate(self.config.train, self.step - 1, self.total_steps),
            "samples_per_second": steps * batch / seconds,
            "time/total": seconds / steps,
            **{f"time/{name}": spent / steps for name, spent in self.timer.take().items()},
        }
        for name, engine in self.submodules.engines.items():
            norm = engine.gradient_norm()
            if norm is not None:
                record[f"gradient_norm/{name}"] = float(norm)
        if self.submodules.opponents:
            record["lr/opponent"] = opponent_learning_rate(self.config.train, self.step - 1, self.total_steps)
        for name, teacher in self.submodules.teachers.items():
            record[f"{name}/distance"] = float(teacher.distance())
        if self.world.is_main:
            append_line(self.run_dir / METRICS, record)
        self.telemetry.set_step(record)
        return f"loss {record['loss']:.4f}, {record['samples_per_second']:.1f} images/s"

    def save(self) -> None:
        """Write a checkpoint; all ranks must call it."""
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "batches_applied": self.batches_applied,
            "world_size": self.world.size,
            "snapshot": self.stream.snapshot.hash,
            "method": self.method.state_dict(),
        }
        keep = self.config.train.keep_checkpoints
        save_checkpoint(self.run_dir, self.step, self.submodules, state, self.world, keep)
        if self.world.is_main:
            append_event(self.run_dir, "checkpoint", step=self.step)
