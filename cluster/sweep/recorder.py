"""What a sweep's driver writes down while Ray Tune runs: the journal, and whole copies of Ray's own state.

Ray copies its state to the sweep's folder file by file, in the background: a driver that is killed may leave
half a file, or files of two moments, and with them nothing to restore. So after each save all files are
copied to a folder that gets its name when it is whole.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ray import tune

from cluster.sweep.journal import Journal
from cluster.sweep.layout import RAY, STATES, Layout
from cluster.sweep.trial import NAME_KEY, PARENT_KEY, split_settings
from frepa_dist.runs import EVENTS, read_json_lines

KEPT_STATES = 2
ERRORS = "error.txt"  # Ray's, of a trial
PATTERNS = (
    "experiment_state-*.json",
    "basic-variant-state-*.json",
    "searcher-state-*.pkl",
    "search_gen_state-*.json",
)


class Recorder(tune.Callback):  # type: ignore[misc]
    """Ray calls it; it holds nothing that is not on disk, for Ray keeps a copy of it.

    Args:
        root: folder of the sweep.
    """

    _journal: Journal | None = None
    _stamp: tuple[float, ...] = ()
    _has_news = True

    def __init__(self, root: Path) -> None:
        self._root = root

    def __getstate__(self) -> dict[str, Any]:
        """What Ray pickles."""
        return {"_root": self._root}

    def _write(self, event: str, trial: Any, **details: Any) -> bool:
        """Write to the journal; what Ray saves next is worth a copy."""
        self._has_news = True
        return self.journal.write(event, trial.trial_id, **details)

    @property
    def journal(self) -> Journal:
        """The journal, opened when it is first needed."""
        if self._journal is None:
            self._journal = Journal(Layout(self._root).journal)
        return self._journal

    def _name(self, trial: Any) -> str:
        return str(trial.config.get(NAME_KEY) or trial.trial_id)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Ray's."""
        values, about = split_settings(trial.config)
        parent = about.get(PARENT_KEY)
        self._write("trial", trial, name=self._name(trial), values=values, parent=parent)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """See Ray's."""
        self._write(
            "report",
            trial,
            name=result["name"],
            report=result["report"],
            step=result["step"],
            value=result["value"],
            details=result["details"],
            stopped=bool(result["done"]) and not result["last"],
            last=result["last"],
        )

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Ray's: it failed, and is tried again."""
        self._note_failure(trial, final=False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Ray's: it failed for good."""
        self._note_failure(trial, final=True)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Ray's."""
        self._write("end", trial)

    def _note_failure(self, trial: Any, *, final: bool) -> None:
        name = self._name(trial)
        self.on_trial_start(0, [], trial)  # it may have failed before
        told = [
            e for e in read_json_lines(Layout(self._root).run(name) / EVENTS) if e["event"] == "trial_failed"
        ]
        common = {"name": name, "final": final}
        if told and self._write("failure", trial, **common, cause=told[-1]["cause"], at=len(told)):
            return
        self._write("failure", trial, **common, cause=describe_death(trial), at=None)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """See Ray's: all that has happened is in its state, if it has just saved it."""
        self._copy_state(trials)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """See Ray's."""
        self._copy_state(trials)

    def _copy_state(self, trials: list[Any]) -> None:
        if not trials:
            return
        staging = Path(trials[0].local_experiment_path)
        files = sorted(path for pattern in PATTERNS for path in staging.glob(pattern))
        stamp = tuple(path.stat().st_mtime for path in files)
        is_new, self._stamp = stamp != self._stamp, stamp
        if not (files and is_new and self._has_news):
            return
        self._has_news = False
        states = list_states(self._root)
        number = int(states[-1].name) + 1 if states else 0
        partial = self._root / STATES / f"partial-{number:08d}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path in files:
            shutil.copyfile(path, partial / path.name)
        partial.rename(partial.with_name(f"{number:08d}"))
        for old in list_states(self._root)[:-KEPT_STATES]:
            shutil.rmtree(old, ignore_errors=True)


def describe_death(trial: Any) -> str:
    """What Ray knows of the end of a trial that could not say anything itself."""
    path = Path(trial.local_path or "") / ERRORS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"its Ray actor, or the node that it was on, died{': ' if last else ''}{last[:300]}"


def list_states(root: Path) -> list[Path]:
    """Whole copies of Ray's state, oldest first."""
    return sorted(path for path in (root / STATES).glob("*") if path.name.isdigit())


def restore_state(root: Path) -> bool:
    """Put the newest whole copy where Ray looks; whether there is one."""
    states = list_states(root)
    if not states:
        return False
    folder = root / RAY
    folder.mkdir(exist_ok=True)
    for pattern in PATTERNS:
        for path in folder.glob(pattern):
            path.unlink()
    for path in states[-1].iterdir():
        shutil.copyfile(path, folder / path.name)
    return True
