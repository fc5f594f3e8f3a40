"""Whether an encoder has seen the images of its evaluation: said before any figure is.

Of a run of ours the dataset is known, and is searched (`shards.audit.leakage`). Of any other encoder nothing
is known, and the result says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from frepa_dist.evaluate.pairs import read_patients
from frepa_dist.runs import CONFIG, load_run_config
from shards.audit.leakage import find_leakage
from shards.audit.leakage_index import NEAR_BITS
from shards.audit.leakage_report import LeakageReport, leakage_error
from shards.audit.patterns import SAME
from shards.audit.stored import StoredImages, image_names
from shards.dataset import load_snapshot
from shards.read.balance import drawn_modalities, left_out
from shards.stores.atomic import replace_file
from shards.support.errors import EnvironmentFault, FrepaError

NOT_CHECKED = "not checked"
FOLDER = "leakage"
"""In a run: what was found, so that the next evaluation on the same images need not search again."""

_SEARCHED: dict[str, LeakageReport] = {}
"""What this process found, by digest: the runs of a suite were mostly pretrained on the same data."""


def check_leakage(
    encoder: str | Path,
    files: Sequence[Path] | StoredImages,
    *,
    images: Path | str,
    allow: bool = False,
    states: Sequence[Path] = (),
    patients: Sequence[str] | None = None,
    tested: Sequence[bool] | None = None,
) -> str:
    """Look for images of an evaluation in the data that its encoder was pretrained on.

    Args:
        encoder: as of `features.load_encoder`; of a run folder the dataset is searched.
        files: images that will be evaluated, training part and test part; or samples of a dataset.
        images: their folder, or that dataset.
        allow: go on where some are found.
        states: private folders of the dataset's builds, see `find_leakage`.
        patients: of each file, where they are known.
        tested: which files are in the test part, None for all. Only these are refused: an encoder may be
            pretrained on the training part, without its labels.

    Returns:
        What was found, a sentence for the result; it begins with "not checked" where nothing is known.

    Raises:
        DataError: some of the test part were found, and `allow` is not set.
        EnvironmentFault: of samples: their dataset, or that of the run, cannot be reached.
    """
    run = Path(encoder)
    if not (run / CONFIG).is_file():
        return f"{NOT_CHECKED}: the encoder is no run folder, so its pretraining images are not known"
    try:
        report = search_run(run, files, images=images, states=states, patients=patients)
    except FrepaError as error:
        if isinstance(files, StoredImages) and isinstance(error, EnvironmentFault):
            raise  # it may be the evaluation's own dataset
        return f"{NOT_CHECKED}: the dataset of the run cannot be searched ({error})"
    summary = report.summary() + _before(run)
    if not report.found:
        return summary
    is_tested = [True] * len(files) if tested is None else tested
    in_test = {name for name, is_test in zip(image_names(files, images), is_tested, strict=True) if is_test}
    leaks = [leak for leak in report.found if leak.file in in_test]
    num_leaks = len({leak.file for leak in leaks})
    summary = f"{summary}; of the test part {num_leaks} of {len(in_test)} {report.unit}"
    if leaks and not allow:
        raise leakage_error(summary, images, leaks[0].describe(with_file=False))
    return f"{summary}, which was allowed" if leaks else summary


def check_split(
    encoder: str | Path,
    split: Sequence[tuple[Path, bool]],
    images: Path,
    table: Path | None,
    *,
    allow: bool = False,
    states: Sequence[Path] = (),
) -> str:
    """Look for the images of a table in the data that an encoder was pretrained on.

    Args:
        encoder: see `check_leakage`, as `images`, `allow` and `states`.
        split: files, and whether each is in the test part.
        images: their folder.
        table: that may name their patients.
        allow: go on where some are found.
        states: private folders of the dataset's builds.

    Raises:
        DataError: some of the test part were found, and `allow` is not set.
    """
    files = [path for path, _ in split]
    return check_leakage(
        encoder,
        files,
        images=images,
        allow=allow,
        states=states,
        patients=read_patients(images, table, files),
        tested=[is_test for _, is_test in split],
    )


def search_run(
    run: Path,
    files: Sequence[Path] | StoredImages,
    *,
    images: Path | str,
    states: Sequence[Path] = (),
    patients: Sequence[str] | None = None,
) -> LeakageReport:
    """Search what a run draws of its dataset; what was found for the same files is taken from its folder.

    Raises:
        FrepaError: the run's dataset cannot be read, or a state folder is none.
    """
    data = load_run_config(run).data
    names = {} if patients is None else {place: name for place, name in enumerate(patients) if name}
    digest = _digest(data.snapshot, left_out(data.modality_weights), files, images, states, names)
    path = run / FOLDER / f"{digest}.json"
    known = _read(path)
    if known is not None:
        return known
    report = _SEARCHED.get(digest)
    if report is None:
        held = load_snapshot(data.root, data.snapshot).modalities
        report = find_leakage(
            data.root,
            files,
            images=images,
            snapshot=data.snapshot,
            modalities=drawn_modalities(data.modality_weights, held),
            states=states,
            patients=names,
        )
    if data.snapshot is not None:  # else the dataset may have grown the next time
        _SEARCHED[digest] = report
        _write(path, report)
    return report


def _before(run: Path) -> str:
    """What the run's weights started from, where that was not a dataset of ours."""
    init = getattr(getattr(load_run_config(run).method, "model", None), "init", None)
    return f"; the images of the weights it started from ({init}) are {NOT_CHECKED}" if init else ""


def _digest(
    snapshot: str | None,
    unwanted: Sequence[str],
    files: Sequence[Path] | StoredImages,
    images: Path | str,
    states: Sequence[Path],
    patients: Mapping[int, str],
) -> str:
    """Names all that the answer depends on; a file by path, size and time of change, a sample by shard."""
    if isinstance(files, StoredImages):
        facts = [[files.shards[shard].path, files.shards[shard].crc32c, row] for shard, row in files.places]
    else:
        facts = [
            [str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path in files for stat in [path.stat()]
        ]
    told = [
        snapshot,
        unwanted,
        NEAR_BITS,
        SAME,
        facts,
        image_names(files, images),
        [str(state.resolve()) for state in states],
        sorted(patients.items()),
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _read(path: Path) -> LeakageReport | None:
    try:
        return LeakageReport.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def _write(path: Path, report: LeakageReport) -> None:
    """Keep a report, where the run folder can be written: a run on a read-only disk is searched each time."""
    try:
        path.parent.mkdir(exist_ok=True)
        with replace_file(path) as file:
            file.write(report.model_dump_json(indent=1).encode())
    except (OSError, FrepaError):
        return
