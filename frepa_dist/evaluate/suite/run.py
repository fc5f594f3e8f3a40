"""Runs a suite: every task on every source of every encoder, one result after the other.

What is known already is not computed again. What fails is written down, and the rest goes on.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from frepa_dist.evaluate.extract import refuse_launcher
from frepa_dist.evaluate.overlays import Gallery
from frepa_dist.evaluate.suite.config import EncoderEntry, Entry, SuiteConfig, choose_tasks
from frepa_dist.evaluate.suite.kinds import RUNNERS, Given
from frepa_dist.evaluate.suite.readings import READERS, Reading
from frepa_dist.evaluate.suite.sources import Pretraining, Weights, find_pretraining, read_weights
from frepa_dist.evaluate.suite.store import (
    WITH_PICTURES,
    WITHOUT_LEAKAGE,
    Cell,
    cell_digest,
    cell_path,
    data_digest,
    is_run,
    pack_pictures,
    read_cell,
    write_cell,
)
from shards.support.errors import ConfigError, EnvironmentFault, FrepaError

Say = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """A result that could not be had.

    Attributes:
        words: why.
        exit_code: of the error, 1 for a bug.
    """

    words: str
    exit_code: int


@dataclass(frozen=True)
class Place:
    """A task, an encoder, and which of its sources."""

    task: str
    encoder: str
    seed: int


@dataclass
class Results:
    """All that a suite found.

    Attributes:
        cells, readings: what there is.
        failures: what could not be had; a place in neither was not asked for.
        pretraining: of each encoder.
        alike: names of encoders that have the same weights.
        num_computed: how many cells were not known before.
    """

    cells: dict[Place, Cell] = field(default_factory=dict)
    readings: dict[Place, Reading] = field(default_factory=dict)
    failures: dict[Place, Failure] = field(default_factory=dict)
    pretraining: dict[str, Pretraining] = field(default_factory=dict)
    alike: list[tuple[str, str]] = field(default_factory=list)
    num_computed: int = 0

    @property
    def exit_code(self) -> int:
        """0 where nothing failed; 1 where there was a bug; else that of the first failure."""
        codes = [failure.exit_code for failure in self.failures.values()]
        return 0 if not codes else 1 if 1 in codes else codes[0]

    def seeds(self, task: str, encoder: EncoderEntry) -> dict[int, Reading]:
        """What the sources of an encoder gave, by their number."""
        places = (Place(task, encoder.name, seed) for seed in range(len(encoder.sources)))
        return {place.seed: self.readings[place] for place in places if place in self.readings}


def run_suite(config: SuiteConfig, *, only: Sequence[str] = (), say: Say = lambda _: None) -> Results:
    """Run the tasks on the encoders; results lie in `config.output` afterwards.

    Args:
        config: what to do.
        only: names of the tasks to compute; of the others what is known is taken.
        say: is told a line for each result; the reason of a failure the first time.

    Raises:
        ConfigError: there is no such task.
        EnvironmentFault: the results cannot be written.
    """
    refuse_launcher()
    wanted = choose_tasks(config, only)
    results = Results(pretraining={entry.name: find_pretraining(entry) for entry in config.encoders})
    images = {task.name: _attempt(partial(data_digest, task)) for task in config.tasks}
    num = len(config.tasks) * sum(len(entry.sources) for entry in config.encoders)
    number, owners = 0, dict[str, str]()  # by digest of weights the first encoder that has them
    for entry in config.encoders:
        own: dict[str, int] = {}
        for seed, source in enumerate(entry.sources):
            weights = _attempt(partial(read_weights, source, config.device))
            if isinstance(weights, Weights):
                if (first := own.setdefault(weights.digest, seed)) != seed:
                    weights = _twin(source, entry.sources[first])
                elif (other := owners.setdefault(weights.digest, entry.name)) != entry.name:
                    results.alike.append((other, entry.name))
            for task in config.tasks:
                place = Place(task.name, entry.name, seed)
                told = _find(config, task, place, source, weights, images, results, task.name in wanted)
                number += 1
                say(f"[{number}/{num}] {task.name}, {entry.name}, {source}: {told}")
    return results


def _twin(source: str, first: str) -> Failure:
    """A source that would count as another seed, and is none."""
    error = ConfigError(
        f"it has the same weights as {first}, so it tells nothing of another seed",
        where=source,
        fix="name a training with another seed, or leave it out",
    )
    return Failure(str(error), error.exit_code)


def _find(
    config: SuiteConfig,
    task: Entry,
    place: Place,
    source: str,
    weights: Weights | Failure,
    images: Mapping[str, str | Failure],
    results: Results,
    is_wanted: bool,
) -> str:
    """Read a result, or compute it; returns what to say of it."""
    digest = images[task.name]
    broken = next((found for found in (weights, digest) if isinstance(found, Failure)), None)
    if broken is not None:
        return _fail(place, broken, results) if is_wanted else "not run"
    assert isinstance(weights, Weights)
    assert isinstance(digest, str)
    # what was had without leave to leak stands with it too
    may_leak = config.allow_leakage and task.kind not in WITHOUT_LEAKAGE and is_run(source)
    keys = [
        cell_digest(
            task,
            digest,
            weights.digest,
            source,
            may_leak=leave,
            states=() if task.kind in WITHOUT_LEAKAGE else config.states,
            num_pictures=config.num_pictures if task.kind in WITH_PICTURES else 0,
        )
        for leave in ([False, True] if may_leak else [False])
    ]
    cell = next((cell for key in keys if (cell := read_cell(config.output, key)) is not None), None)
    if cell is None and not is_wanted:
        return "not run"
    if cell is None:
        path = cell_path(config.output, place.task, f"{place.encoder}-{place.seed}", keys[-1])
        made = _attempt(partial(_compute, config, task, source, weights, path))
        if isinstance(made, Failure):
            return _fail(place, made, results)
        cell = made
        results.num_computed += 1
        words = f", {cell.seconds:.0f} s"
    else:
        words = ", known"
    reading = _attempt(partial(_read, cell))
    if isinstance(reading, Failure):
        return _fail(place, reading, results)
    results.cells[place], results.readings[place] = cell, reading
    return f"{reading.main} {reading.measures[reading.main].value:.3f}{words}"


def _fail(place: Place, failure: Failure, results: Results) -> str:
    """Keep a failure; returns what to say of it, the reason once."""
    is_known = failure in results.failures.values()
    results.failures[place] = failure
    return "failed for a reason that was told" if is_known else f"failed: {failure.words}"


def _read(cell: Cell) -> Reading:
    result_class, read = READERS[cell.kind]
    return read(result_class.model_validate(cell.result))


def _compute(config: SuiteConfig, task: Entry, source: str, weights: Weights, path: Path) -> Cell:
    gallery: Gallery = []
    given = Given(config.extraction, config.allow_leakage, config.states, config.num_pictures, gallery)
    started = time.monotonic()
    result = RUNNERS[task.kind](task, source, given)
    cell = Cell(
        kind=task.kind,
        source=source,
        encoder=weights.name,
        result=result.model_dump(mode="json"),
        pictures=pack_pictures(gallery),
        seconds=time.monotonic() - started,
    )
    write_cell(path, cell)
    return cell


def _attempt(work: Callable[[], T]) -> T | Failure:
    """Do some work, and say why it failed where it did; only a disk that refuses ends the suite."""
    try:
        return work()
    except EnvironmentFault as error:
        if "cannot be written" in error.what:
            raise
        return Failure(str(error), error.exit_code)
    except FrepaError as error:
        return Failure(str(error), error.exit_code)
    except Exception as error:  # a bug, or a device out of memory, must not take the other results down
        traceback.print_exc()
        return Failure(f"{type(error).__name__}: {error}", 1)
