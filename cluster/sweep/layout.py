"""The folder of a sweep: what lies where.

OUTPUT/sweep.yaml            the sweep as it was started, resolved
OUTPUT/base.yaml             the run config that its trials start from
OUTPUT/journal.jsonl         all that happened, see `journal`
OUTPUT/trials/NAME/          the run folder of a trial; under PBT a trial may have several, one after another
OUTPUT/trials/NAME.yaml      the run config it was started with
OUTPUT/trials/NAME.log       what its supervisors printed; ranks have their own in the run folder
OUTPUT/trials/NAME/reports.jsonl   what was measured at its checkpoints: it is not measured twice
OUTPUT/table.csv, .json      the trials; settings.csv, .json where seeds were swept
OUTPUT/best.yaml             the run config of the best, for `frepa pretrain --config`
OUTPUT/report.html           plots
OUTPUT/ray/, OUTPUT/states/  Ray's own state, and whole copies of it
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.sweep.config import SweepConfig, read_sweep
from cluster.sweep.journal import JOURNAL
from shards.support.errors import DataError

SWEEP, TRIALS, RAY, STATES, LOCK = "sweep.yaml", "trials", "ray", "states", ".sweep.lock"


@dataclass(frozen=True)
class Layout:
    """Paths in the folder of a sweep."""

    root: Path

    @property
    def journal(self) -> Path:
        """Journal of all trials."""
        return self.root / JOURNAL

    def run(self, name: str) -> Path:
        """Run folder of a trial."""
        return self.root / TRIALS / name

    def config(self, name: str) -> Path:
        """The run config a trial was started with."""
        return self.root / TRIALS / f"{name}.yaml"

    def log(self, name: str, node: int = 0) -> Path:
        """What the supervisor of a node printed."""
        return self.root / TRIALS / (f"{name}.log" if not node else f"{name}.node-{node}.log")

    def reports(self, name: str) -> Path:
        """What was measured at the checkpoints of a run."""
        return self.run(name) / "reports.jsonl"


def load_sweep(root: Path) -> SweepConfig:
    """The sweep of a folder.

    Raises:
        DataError: there is none.
    """
    if not (root / SWEEP).is_file():
        raise DataError(f"no sweep: it has no {SWEEP}", where=root, fix="name the `output` of a sweep")
    return read_sweep(root / SWEEP)
