"""The training loop. It knows submodules and named losses, and no method by name."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frepa_dist.config import RunConfig
from frepa_dist.journal import append_event, append_line
from frepa_dist.methods.base import StepInfo
from frepa_dist.methods.registry import create_method
from frepa_dist.runs import METRICS
from frepa_dist.train.checkpoint import Checkpoints, load_checkpoint, newest_good
from frepa_dist.train.engines import World
from frepa_dist.train.guards import Reading
from frepa_dist.train.ledger import Ledger, Watch
from frepa_dist.train.live import LiveMetrics
from frepa_dist.train.monitors import Monitors
from frepa_dist.train.records import Averages, PhaseTimer, truncate_metrics
from frepa_dist.train.schedule import learning_rate, opponent_learning_rate
from frepa_dist.train.step import Batch, Stepper
from frepa_dist.train.stop import Control
from frepa_dist.train.submodules import Submodules
from shards.read.order import check_batch_sizes
from shards.read.stream import MicroBatch, SampleStream
from shards.support.errors import DivergedError
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
        self.config, self.run_dir, self.world = config, run_dir, world
        self.live = LiveMetrics(telemetry, world, config.data)
        self.control = control or Control()
        train = config.train
        accumulation = check_batch_sizes(train.global_batch_size, world.size, train.micro_batch_size)
        self.stream = SampleStream(
            config.stream_config(), config.order_config(), world.rank, world.size, train.micro_batch_size
        )
        dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        self.method = create_method(config.method, compute_dtype=dtype)
        self.submodules = Submodules(self.method, train, accumulation, world)
        self.total_steps = train.steps or self.stream.total_batches(train.epochs or 0)
        self.step = self.epoch = self.batches_applied = 0
        self.timer, self.averages = PhaseTimer(self.live.spend), Averages()
        skip = train.guard.skip_spikes
        self.stepper = Stepper(self.method, self.submodules, world, self.timer, self.averages, skip)
        self.ledger, self.watch = Ledger(train.guard), Watch(run_dir, world, train.log_keys)
        self._checkpoint_is_due = False
        self._logged_at, self._logged_step = time.perf_counter(), 0
        self._last_record: dict[str, Any] = {}
        self.checkpoints = Checkpoints(
            config, run_dir, self.submodules, world, self.stream.snapshot.hash, self.live.end_checkpoint
        )
        self.live.begin(self.step, self.total_steps)
        self.monitors = Monitors(train.deepspeed if world.is_main else {}, run_dir)

    def begin_again(self) -> None:
        """Drop what a start before the first checkpoint has written; all ranks must call it."""
        self.watch.truncate_keys(0)
        if self.world.is_main:
            truncate_metrics(self.run_dir, 0)
            self.monitors.go_back(0)

    def resume(self, checkpoint: Path) -> None:
        """Go back to a checkpoint: weights, optimizers, schedules, random state, place in the data."""
        snapshot = self.stream.snapshot.hash
        state = load_checkpoint(checkpoint, self.submodules, self.world, self.config, snapshot)
        self.method.load_state_dict(state["method"])
        self.step, self.epoch = state["step"], state["epoch"]
        self.batches_applied = state["batches_applied"]
        self.ledger.load_state_dict(state.get("guard"))
        self.watch.truncate_keys(self.step)
        self._logged_step = self.step
        if self.world.is_main:
            truncate_metrics(self.run_dir, self.step)
            self.monitors.go_back(self.step)
        self.checkpoints.copy()
        self.live.begin(self.step, self.total_steps, checkpoint)

    def run(self) -> None:
        """Train to the end of the schedule, or until asked to stop; all ranks must call it.

        Raises:
            DivergedError: too many steps in a row were skipped, and going back did not help.
        """
        silent = not self.world.is_main
        with Progress(
            self.total_steps, "pretrain", unit="step", initial=self.step, silent=silent
        ) as progress:
            self._logged_at = time.perf_counter()
            while self.step < self.total_steps and not self.control.agreed:
                if self._run_epoch(progress):
                    self.epoch, self.batches_applied = self.epoch + 1, 0
        self.checkpoints.finish()
        # who is asked to stop has little time: the next start copies what is missing
        if self.config.train.checkpoint_copy is not None and not self.control.agreed:
            heartbeat = self.control.heartbeat
            self.world.wait_for_main(self.checkpoints.wait_for_copies, lambda: heartbeat.beat(self.step))

    def _run_epoch(self, progress: Progress) -> bool:
        """Train on what is left of an epoch; False where the run went back to a checkpoint, or is to stop."""
        train = self.config.train
        batches = iter(self.stream.batches(self.epoch, self.batches_applied))
        while self.step < self.total_steps:
            began = time.perf_counter()
            with self.timer.phase("data"):
                micro_batches = next(batches, None)
                if micro_batches is None:
                    return True
                on_device = [self.to_device(batch) for batch in micro_batches]
            self._take_step(on_device)
            if self.ledger.must_go_back:
                del batches, micro_batches  # another pass over the stream begins
                progress.update(-self._go_back())
                return False
            note = ""
            if self._is_logged(self.step):
                note = self._log()
            self._checkpoint_is_due |= self.step % train.checkpoint_every == 0
            # what comes before steps that are skipped may be why they are: such a state is not kept as good
            is_doubtful = bool(self.ledger.streak)
            is_due = self._checkpoint_is_due and not is_doubtful
            stop = self.control.after_step(self.step)
            if is_due or stop or self.step == self.total_steps:
                with self.timer.phase("checkpoint"):
                    self.save()
            self.live.end_step(self.step, self.epoch, time.perf_counter() - began)
            progress.update(note=note)
            if stop:
                return False
        return True

    def _take_step(self, micro_batches: list[Batch]) -> None:
        """Train on a global batch, or pass over it, and account for it."""
        place, limit = (self.epoch, self.batches_applied), self.ledger.limit
        reading: Reading | None = None
        if place not in self.ledger.passed:
            is_logged = self._is_logged(self.step + 1)
            info = StepInfo(self.step, self.total_steps, self.config.train.seed, is_logged)
            reading = self.stepper.run(micro_batches, info, limit)
        self.step, self.batches_applied = self.step + 1, self.batches_applied + 1
        self.ledger.account(place, reading)
        keys = [key for batch in micro_batches for key in batch["key"]]
        was_used = reading is not None and not reading.was_skipped
        self.live.train(len(keys) if was_used else 0, self.ledger.counts)
        self.watch.note_step(self.step, place, reading, keys, limit)

    def _go_back(self) -> int:
        """Return to the last good checkpoint, from where the batches that were skipped are passed over.

        Returns:
            How many steps are taken back.

        Raises:
            DivergedError: there is no checkpoint, or going back did not help before.
        """
        bad, passed, returns = list(self.ledger.streak), self.ledger.passed, self.ledger.returns
        self.checkpoints.settle()  # the newest may still be being written
        found = self.world.from_main(newest_good(self.run_dir) if self.world.is_main else None)
        if found is None or not self.ledger.may_go_back:
            tried = (
                f"after going back {returns} times" if found else "and there is no checkpoint to go back to"
            )
            raise DivergedError(
                f"losses, gradients or weights are no longer finite in {len(bad)} steps in a row up to step "
                f"{self.step}, {tried}",
                where=self.run_dir,
                fix="see `step_skipped` in events.jsonl; start a new run with a lower learning rate or loss "
                "weight; checkpoints before stay",
            )
        left = self.step
        self.averages.take(self.world)  # of steps that are undone
        self.timer.take()
        self.resume(found)
        self.ledger.went_back(bad, passed, returns)
        self.watch.went_back(left, self.step, bad)
        self.live.train(0, self.ledger.counts)
        self._checkpoint_is_due = False
        self._logged_at = time.perf_counter()
        return left - self.step

    def to_device(self, batch: MicroBatch) -> Batch:
        """Move a micro-batch to where this rank computes; samples that were skipped are written down."""
        for skipped in batch["skipped"]:
            append_event(self.run_dir, "sample_skipped", step=self.step, **skipped)
        self.live.load(batch)
        if self.config.data.bad_samples == "skip":
            share = len(batch["skipped"]) / len(batch["key"])
            self.averages.add({"data/skipped": torch.full((), share, device=self.world.device)})
        return {
            name: value.to(self.world.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def _is_logged(self, step: int) -> bool:
        """Whether a line is logged after a step."""
        return step % self.config.train.log_every == 0 or step == self.total_steps

    def _log(self) -> str:
        """Read the means, write a line, and return a few words for the progress bar."""
        means = self.averages.take(self.world)
        self.watch.note_guards(self.step, means)
        now = time.perf_counter()
        steps, seconds = self.step - self._logged_step, now - self._logged_at
        self._logged_at, self._logged_step = now, self.step
        batch = self.config.train.global_batch_size
        record: dict[str, Any] = {
            "step": self.step,
            "epoch": self.epoch,
            "samples": self.step * batch,
            **means,
            **self.ledger.take_counts(),
            "lr": learning_rate(self.config.train, self.step - 1, self.total_steps),
            "samples_per_second": steps * batch / seconds,
            "time/total": seconds / steps,
            **{f"time/{name}": spent / steps for name, spent in self.timer.take().items()},
        }
        for name, engine in self.submodules.engines.items():
            norm = engine.gradient_norm()
            if norm is not None and not self.ledger.streak:  # of a skipped step it says nothing
                record[f"gradient_norm/{name}"] = float(norm)
        if self.submodules.opponents:
            record["lr/opponent"] = opponent_learning_rate(self.config.train, self.step - 1, self.total_steps)
        for name, teacher in self.submodules.teachers.items():
            record[f"{name}/distance"] = float(teacher.distance())
        # a guard's own metrics may show what it kept out
        record = {name: value for name, value in record.items() if math.isfinite(value)}
        self._last_record = record
        if self.world.is_main:
            append_line(self.run_dir / METRICS, record)
            self.monitors.write(record)
        self.live.log(record)
        return f"loss {record.get('loss', math.nan):.4f}, {record['samples_per_second']:.1f} images/s"

    def save(self) -> None:
        """Take a checkpoint, which is written while training goes on; all ranks must call it."""
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "batches_applied": self.batches_applied,
            "method": self.method.state_dict(),
            "guard": self.ledger.state_dict(),
        }
        doubtful = bool(self.ledger.streak)
        self.checkpoints.save(self.step, state, self._last_record, is_doubtful=doubtful)
        self.ledger.saved()
        self._checkpoint_is_due = False
