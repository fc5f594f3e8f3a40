"""A training job in simulated time: steps, checkpoints, failures, restarts, stragglers, cold caches.

- All ranks wait for the slowest in every step. The time of a rank for a step is lognormal around its median.
- Loading runs beside the step; nodes whose caches are cold share the storage.
- A checkpoint halts training for a moment and is then written beside it. Only one that is whole can be gone
  back to, and the next waits for the one before.
- Failures are exponential over the whole job: the rates of independent parts add up. A failure loses what
  came after the last whole checkpoint; then it must be noticed and the job started again, which a further
  failure starts over. The failed node may come back with an empty cache.

Events are coarse: a stretch of many steps and checkpoints is drawn at once, and a failure finds out how far
it had come; where checkpoints are far apart one draw stands for several steps. So weeks on a thousand GPUs
take a fraction of a second.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray
from scipy.special import ndtri

from cluster.planning.caches import Caches, Storage

# Draws of steps' times: of a stretch, and of the steps between two checkpoints.
MOST_DRAWS, DRAWS_OF_INTERVAL = 1 << 16, 16
Floats = NDArray[np.float64]
Events = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Scenario:
    """A job.

    Attributes:
        steps: of the run.
        step_seconds: of a step whose ranks all take their median time, data at hand.
        checkpoint_steps: between two checkpoints; the last step makes one too.
        stall_seconds: that training stands still for a checkpoint.
        write_seconds: from then until it can be gone back to.
        mtbf_seconds: between failures of the job; infinite: none.
        detect_seconds: until a failure is noticed, of a rank that dies.
        hang_seconds: of one that hangs.
        hang_share: of the failures that are hangs.
        restart_seconds: from then until training goes on.
        ranks: GPUs.
        nodes: that hold them.
        straggler_sigma: of the logarithm of a rank's time for a step.
        lost_cache_share: of failures after which the node's cache is empty.
        storage: what loading asks for; None: data are always at hand.
    """

    steps: int
    step_seconds: float
    checkpoint_steps: int
    stall_seconds: float
    write_seconds: float
    mtbf_seconds: float
    detect_seconds: float = 0.0
    hang_seconds: float = 0.0
    hang_share: float = 0.0
    restart_seconds: float = 0.0
    ranks: int = 1
    nodes: int = 1
    straggler_sigma: float = 0.0
    lost_cache_share: float = 0.0
    storage: Storage | None = None


@dataclass(frozen=True)
class Spent:
    """Seconds of a simulated job, by what they were spent on.

    Attributes:
        useful: steps x step_seconds.
        stragglers: more than that for the slowest rank.
        data: waiting for data, at the start and in steps.
        checkpoints: standing still for them.
        lost: all of that after the last whole checkpoint before a failure.
        down: from a failure until the job is started again.
    """

    useful: float = 0.0
    stragglers: float = 0.0
    data: float = 0.0
    checkpoints: float = 0.0
    lost: float = 0.0
    down: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return float(sum(vars(self).values()))


@dataclass(frozen=True)
class Outcome:
    """How a simulated job went: its seconds, and the failures that struck it."""

    spent: Spent
    failures: int

    @property
    def seconds(self) -> float:
        """Until its end."""
        return self.spent.total

    @property
    def goodput(self) -> float:
        """Share of the time that brought the run forward."""
        return self.spent.useful / self.seconds


@dataclass(frozen=True)
class _Stretch:
    """Steps drawn ahead, by checkpoint interval; (n,) each.

    Attributes:
        steps: after each interval.
        ends: seconds from the stretch's start until the stall of each one's checkpoint is over.
        useful, stragglers, data, checkpoints: seconds of each.
    """

    steps: NDArray[np.int64]
    ends: Floats
    useful: Floats
    stragglers: Floats
    data: Floats
    checkpoints: Floats

    def spent(self, begin: int, end: int) -> Spent:
        """Sums over some of the intervals."""
        part = slice(begin, end)
        return Spent(
            float(self.useful[part].sum()),
            float(self.stragglers[part].sum()),
            float(self.data[part].sum()),
            float(self.checkpoints[part].sum()),
        )


def simulate(scenario: Scenario, seed: int) -> Outcome:
    """Run a job to its end; with the same seed failures strike at the same times, whatever the interval."""
    job = _Job(scenario, seed)
    job.env.run(until=job.process)
    known = job.spent
    spent = Spent(**{**known, "lost": max(0.0, job.env.now - sum(known.values()))})
    return Outcome(spent, job.failures)


class _Job:
    """The state of a simulated job. `spent` holds what is not lost: that up to the last whole checkpoint."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario, self.env = scenario, simpy.Environment()
        # of their own, so that other draws do not move the failures
        self._failure_rng, self._rng = (np.random.default_rng([seed, stream]) for stream in (0, 1))
        self.step = self.saved = self.failures = 0
        self.spent = dict.fromkeys(("useful", "stragglers", "data", "checkpoints", "down"), 0.0)
        self._written_at, self._unwritten = 0.0, Spent()  # the last checkpoint of the stretch before
        self._caches = Caches(scenario.storage, scenario.nodes)
        self.process = self.env.process(self._run())
        if not math.isinf(scenario.mtbf_seconds):
            self.env.process(self._fail())

    def _fail(self) -> Events:
        while True:
            yield self.env.timeout(float(self._failure_rng.exponential(self.scenario.mtbf_seconds)))
            self.failures += 1
            self.process.interrupt()

    def _run(self) -> Events:
        is_down = False
        while self.saved < self.scenario.steps:
            try:
                if is_down:
                    yield from self._restart()
                    is_down = False
                yield from self._wait("data", self._caches.first_seconds())
                while self.step < self.scenario.steps:
                    yield from self._train()
                yield from self._wait("checkpoints", self._written_at - self.env.now)
                self._settle()
            except simpy.Interrupt:
                self._settle()
                self._fall_back()
                is_down = True

    def _train(self) -> Events:
        """Take a stretch of steps and checkpoints, or as much of it as a failure leaves."""
        stretch, begun = self._draw(), self.env.now
        try:
            yield self.env.timeout(float(stretch.ends[-1]))
        except simpy.Interrupt:
            self._settle()
            elapsed = self.env.now - begun
            whole = int(np.searchsorted(stretch.ends + self.scenario.write_seconds, elapsed, side="right"))
            if whole:
                self._keep(stretch.spent(0, whole), int(stretch.steps[whole - 1]))
            reached = int(np.searchsorted(stretch.ends, elapsed, side="right"))
            if reached:
                self._caches.read_up_to(int(stretch.steps[reached - 1]))
            raise
        self._settle()
        num = len(stretch.steps)
        if num > 1:
            self._keep(stretch.spent(0, num - 1), int(stretch.steps[-2]))
        self.step = int(stretch.steps[-1])
        self._caches.read_up_to(self.step)
        self._unwritten = stretch.spent(num - 1, num)
        self._written_at = self.env.now + self.scenario.write_seconds

    def _draw(self) -> _Stretch:
        """The steps from here on, whole checkpoint intervals of them, up to the run's end."""
        scenario = self.scenario
        every, seconds = scenario.checkpoint_steps, scenario.step_seconds
        varies = scenario.straggler_sigma > 0 or scenario.storage is not None
        piece = -(-every // DRAWS_OF_INTERVAL) if varies else every
        wanted = min(MOST_DRAWS * piece, 2 * scenario.mtbf_seconds / seconds)  # more would mostly be lost
        number = min(scenario.steps - self.step, max(1, int(wanted // every)) * every)
        starts = np.arange(0, number, every)
        pieces = (starts[:, None] + np.arange(0, every, piece)).ravel()
        pieces = pieces[pieces < number]
        lengths = np.diff(pieces, append=number)
        compute = seconds * self._slowdowns(len(pieces))
        took = np.maximum(compute, self._caches.step_seconds(self.step + pieces))
        first = np.searchsorted(pieces, starts)
        work, computing = (np.add.reduceat(each * lengths, first) for each in (took, compute))
        # a checkpoint waits for the one before
        before = np.full(len(starts), scenario.write_seconds)
        before[0] = max(0.0, self._written_at - self.env.now)
        standing = np.maximum(before - work, 0.0) + scenario.stall_seconds
        steps = np.minimum(starts + every, number)
        useful = np.diff(steps, prepend=0) * seconds
        return _Stretch(
            steps=self.step + steps,
            ends=np.cumsum(work + standing),
            useful=useful,
            stragglers=computing - useful,
            data=work - computing,
            checkpoints=standing,
        )

    def _slowdowns(self, number: int) -> Floats:
        """(number,) times of the slowest rank over the median one's: the largest of W lognormal draws."""
        scenario = self.scenario
        if not scenario.straggler_sigma:
            return np.ones(number)
        quantile = self._rng.random(number) ** (1 / scenario.ranks)
        return np.asarray(np.exp(scenario.straggler_sigma * ndtri(quantile)))

    def _settle(self) -> None:
        """See whether the last checkpoint of the stretch before has been written meanwhile."""
        if self.step > self.saved and self.env.now >= self._written_at:
            self._keep(self._unwritten, self.step)

    def _keep(self, spent: Spent, step: int) -> None:
        """A checkpoint is whole: what came before it cannot be lost any more."""
        self.saved = step
        for name in ("useful", "stragglers", "data", "checkpoints"):
            self.spent[name] += getattr(spent, name)

    def _fall_back(self) -> None:
        """Lose what came after the last whole checkpoint."""
        if self._rng.random() < self.scenario.lost_cache_share:
            self._caches.empty(int(self._rng.integers(self.scenario.nodes)), self.saved)
        self.step, self._written_at = self.saved, 0.0

    def _restart(self) -> Events:
        is_hang = self._rng.random() < self.scenario.hang_share
        notice = self.scenario.hang_seconds if is_hang else self.scenario.detect_seconds
        yield from self._wait("down", notice + self.scenario.restart_seconds)

    def _wait(self, cause: str, seconds: float) -> Events:
        """Time that no checkpoint decides about; an interrupted wait counts as far as it came."""
        begun = self.env.now
        try:
            if seconds > 0:
                yield self.env.timeout(seconds)
        finally:
            self.spent[cause] += self.env.now - begun
