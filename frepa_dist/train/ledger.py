"""What became of every batch: trained on, skipped, passed over; and when a run must go back.

`Ledger` is pure bookkeeping, equal on all ranks. `Watch` writes what it says into the run folder. The keys of
the samples, where `train.log_keys` asks for them, are lines of RUN/keys/rank-R.jsonl: step (from 1), epoch,
batch, whether it was used, the keys of the rank's part.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from frepa_dist.config import GuardConfig
from frepa_dist.journal import append_event, append_line
from frepa_dist.runs import KEYS, read_json_lines
from frepa_dist.train.engines import World
from frepa_dist.train.guards import Reading
from shards.stores.atomic import replace_text

Place = tuple[int, int]  # epoch, and batch in it
MIN_LOSSES = 20  # before a spike can be told
COUNTED = ("skipped", "passed_over", "spikes", "returns")


def spike_limit(losses: Sequence[float], deviations: float | None) -> float:
    """The loss above which the next one is a spike; infinite where there are too few to tell."""
    if deviations is None or len(losses) < MIN_LOSSES:
        return math.inf
    median = statistics.median(losses)
    distance = statistics.median(abs(loss - median) for loss in losses)
    return median + deviations * max(1.4826 * distance, 0.01 * abs(median))


class Ledger:
    """The account of batches, equal on all ranks and kept in checkpoints.

    Args:
        config: when to go back.

    Attributes:
        passed: batches that are not trained on any more.
        streak: the batches that were skipped in a row up to now.
        losses: of the latest steps that were applied.
        is_broken: whether weights are not finite: no good batch would mend them.
        returns: how often the run went back since it last made a checkpoint.
        counts: what happened since this process began.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.passed: set[Place] = set()
        self.streak: list[Place] = []
        self.losses: deque[float] = deque(maxlen=config.spike_window)
        self.is_broken = False
        self.returns = 0
        self.counts: Counter[str] = Counter()
        self._told: Counter[str] = Counter()

    @property
    def limit(self) -> float:
        """The loss above which the next one is a spike."""
        return spike_limit(self.losses, self.config.spike_deviations)

    @property
    def must_go_back(self) -> bool:
        """Whether too many steps in a row were skipped, or weights are broken."""
        return self.is_broken or len(self.streak) >= self.config.patience

    @property
    def may_go_back(self) -> bool:
        """Whether going back may still help."""
        return self.returns < self.config.most_returns

    def account(self, place: Place, reading: Reading | None) -> None:
        """Note what became of a batch; None: it was passed over."""
        if reading is None:
            self.counts["passed_over"] += 1
            return
        self.counts["spikes"] += reading.is_spike
        self.is_broken = any(name.endswith("/weights") for name in reading.bad)
        if reading.was_skipped:
            self.counts["skipped"] += 1
            self.streak.append(place)
            return
        self.streak.clear()
        self.losses.append(reading.loss)

    def went_back(self, bad: Sequence[Place], passed_before: set[Place], returns_before: int) -> None:
        """Note that the state is a checkpoint's again, which knows nothing of what came after it."""
        self.passed |= passed_before | set(bad)
        self.returns, self.is_broken = returns_before + 1, False
        self.streak.clear()
        self._told = self.counts.copy()  # of steps that are undone
        self.counts["returns"] += 1

    def saved(self) -> None:
        """Note that there is a new checkpoint."""
        self.returns = 0

    def take_counts(self) -> dict[str, float]:
        """What happened since the last call, as metrics."""
        counts = {f"guard/{name}": float(self.counts[name] - self._told[name]) for name in COUNTED}
        self._told = self.counts.copy()
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        passed = [list(place) for place in sorted(self.passed)]
        streak = [list(place) for place in self.streak]
        return {"passed": passed, "streak": streak, "losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take back what `state_dict` gave; None: a checkpoint from before there was a ledger."""
        state = state or {"passed": [], "streak": [], "losses": []}
        self.passed = {(epoch, batch) for epoch, batch in state["passed"]}
        self.streak = [(epoch, batch) for epoch, batch in state["streak"]]
        self.losses = deque(state["losses"], maxlen=self.config.spike_window)


class Watch:
    """Writes what the guards found into the run folder.

    Args:
        run_dir: the run folder.
        world: this rank among the others.
        log_keys: whether the keys of every step are written.
    """

    def __init__(self, run_dir: Path, world: World, log_keys: bool) -> None:
        self._run_dir, self._world, self._log_keys = run_dir, world, log_keys
        self._lowered: set[str] = set()

    def note_step(
        self, step: int, place: Place, reading: Reading | None, keys: Sequence[str], limit: float
    ) -> None:
        """Write a step's events, and its keys; all ranks must call it.

        Args:
            step: number of the step, from 1.
            place: of its batch.
            reading: what was found; None where the batch was passed over.
            keys: of this rank's part of the batch.
            limit: the loss above which it was a spike.
        """
        epoch, batch = place
        where = {"step": step, "epoch": epoch, "batch": batch}
        used = reading is not None and not reading.was_skipped
        if self._log_keys:
            path = self._run_dir / KEYS / f"rank-{self._world.rank}.jsonl"
            path.parent.mkdir(exist_ok=True)
            append_line(path, {**where, "used": used, "keys": list(keys)})
        if reading is None:
            self._event("batch_passed_over", **where)
            return
        if not (reading.bad or reading.is_spike):
            return
        parts: list[Any] = [None] * self._world.size
        dist.all_gather_object(parts, (reading.own_loss_is_bad, list(keys)))
        ranks = [rank for rank, (is_bad, _) in enumerate(parts) if is_bad]
        of_whom = ranks or range(self._world.size)
        samples = [key for rank in of_whom for key in parts[rank][1]]
        if reading.bad:
            self._event("step_skipped", **where, not_finite=reading.bad, ranks=ranks, keys=samples)
        else:
            told = {"loss": reading.loss, "limit": limit, "skipped": reading.was_skipped}
            self._event("loss_spike", **where, **told, keys=samples)

    def note_guards(self, step: int, means: Mapping[str, float]) -> None:
        """Write when a method's guard begins and ends to act, from the metrics of logged steps.

        See `Losses.metrics`: of `.../skipped`, a share, and `.../multiplier`, a factor of 1 at most.
        """
        for name, value in means.items():
            kind = name.rpartition("/")[2]
            if kind not in ("skipped", "multiplier") or name.startswith(("data/", "guard/")):
                continue
            acts = value > 0 if kind == "skipped" else value < 1
            if acts != (name in self._lowered):
                self._event("guard_acts" if acts else "guard_rests", step=step, metric=name, value=value)
                self._lowered ^= {name}

    def went_back(self, step: int, to_step: int, bad: Sequence[Place]) -> None:
        """Write that the run went back to a checkpoint."""
        places = [{"epoch": epoch, "batch": batch} for epoch, batch in bad]
        self._event("went_back", step=step, to_step=to_step, passed_over=places)

    def truncate_keys(self, step: int) -> None:
        """Drop the keys of steps after `step`, of all ranks there ever were; all ranks must call it."""
        if self._log_keys:
            if self._world.is_main:
                for path in sorted((self._run_dir / KEYS).glob("rank-*.jsonl")):
                    kept = [record for record in read_json_lines(path) if record["step"] <= step]
                    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
            dist.barrier()

    def _event(self, event: str, **details: Any) -> None:
        if self._world.is_main:
            append_event(self._run_dir, event, **details)


def read_keys(run_dir: Path) -> dict[int, tuple[bool, list[str]]]:
    """What every step of a run's surviving trajectory was given: step -> (whether it used them, keys)."""
    steps: dict[int, tuple[bool, list[str]]] = {}
    for path in sorted((run_dir / KEYS).glob("rank-*.jsonl")):
        records = read_json_lines(path)
        assert len({record["step"] for record in records}) == len(records), f"{path}: a step is there twice"
        for record in records:
            used, keys = steps.get(record["step"], (record["used"], []))
            assert used == record["used"], f"ranks differ about step {record['step']}"
            steps[record["step"]] = used, keys + record["keys"]
    return dict(sorted(steps.items()))
