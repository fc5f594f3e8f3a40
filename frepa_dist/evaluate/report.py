"""The page about a run: curves, reconstructions with spectra, HF tokens, CKA, probe, settings, time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from frepa_dist.config import RunConfig
from frepa_dist.evaluate.cka import CkaResult
from frepa_dist.evaluate.plots import curve_figure, intervals_figure, phases_figure
from frepa_dist.evaluate.probe_result import SHOWN, ProbeResult
from frepa_dist.evaluate.report_pictures import add_pictures
from frepa_dist.runs import (
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    EVENTS,
    METRICS,
    OUTCOME,
    STUDENT_WEIGHTS,
    find_checkpoint,
    load_run_config,
    read_metrics,
)
from shards.support.errors import DataError
from shards.support.page import Page
from shards.support.settings import Settings, dump_yaml

PLACES = (
    (CONFIG, "the resolved configuration, with the dataset snapshot it is pinned to"),
    (METRICS, "a JSON line per logged step"),
    (EVENTS, "a JSON line per start, checkpoint, skipped sample, failure"),
    (OUTCOME, "how the last start ended"),
    (ENVIRONMENT, "versions of what computed it"),
)

SINGLE = ("hf_share",)  # values of metrics.jsonl that are drawn, and belong to no group

Result = Mapping[str, Any]
R = TypeVar("R", bound=Settings)


def build_report(
    run_dir: Path,
    out_html: Path,
    *,
    probe: Result | Sequence[Result] | None = None,
    cka: Result | None = None,
    notes: Sequence[str] = (),
    refresh_seconds: float | None = None,
) -> None:
    """Write the page about a run, one self-contained file.

    What the run does not have (yet) is said in the place where it would be.

    Args:
        run_dir: the run.
        out_html: the page.
        probe: results of `frepa evaluate probe`, as JSON data; several to be shown beside each other.
        cka: result of `frepa evaluate cka`, as JSON data.
        notes: sentences for the top of the page.
        refresh_seconds: how often a browser reads the page again, while it is kept up to date.

    Raises:
        DataError: `run_dir` is no run, or a result is not one.
        EnvironmentFault: the page cannot be written.
    """
    config, records = load_run_config(run_dir), read_metrics(run_dir)
    given = [probe] if isinstance(probe, Mapping) else list(probe or ())
    probes = [_read(ProbeResult, item) for item in given]
    similarity = None if cka is None else _read(CkaResult, cka)
    outcome, environment = _read_json(run_dir / OUTCOME), _read_json(run_dir / ENVIRONMENT)

    page = Page(f"{config.method.name} run: {run_dir.resolve().name}", _subtitle(config), refresh_seconds)
    if refresh_seconds is not None:
        page.note(f"The run goes on. This page is read again every {refresh_seconds:g} seconds.")
    for note in notes:
        page.note(note)
    add_summary(page, config, records, outcome, environment)
    add_curves(page, records)
    add_pictures(page, run_dir, config)
    add_cka(page, similarity)
    add_probes(page, probes)
    add_time(page, records)
    page.heading("Configuration")
    page.code(dump_yaml(config.model_dump(mode="json")))
    add_places(page, run_dir, config)
    page.write(out_html)


def _read(kind: type[R], data: Result) -> R:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise DataError(f"not a {kind.__name__}: {error.error_count()} wrong fields") from error


def _read_json(path: Path) -> dict[str, Any]:
    """A small file of the run, empty where it is not there."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:  # or no longer there: a run that is started again takes its outcome away
        return {}
    return data


def _subtitle(config: RunConfig) -> str:
    settings, said = config.method.input, config.method.model_dump()["model"]
    network = said.get("backbone") or f"ViT {said['size']}"
    return f"{network}, {settings.patch_size}-pixel cells, {settings.image_size}-pixel views"


def add_summary(
    page: Page,
    config: RunConfig,
    records: Sequence[Result],
    outcome: Result,
    environment: Result,
) -> None:
    """Say in one table what was run, how far it came and how fast it was."""
    page.heading("Summary")
    last: Result = records[-1] if records else {}
    speeds = [r["samples_per_second"] for r in records[1:] or records]
    batch = config.train.global_batch_size
    state = outcome.get("outcome", "not ended, or ended without a word")
    steps = max(last.get("step", 0), outcome.get("step", 0))  # not every step is logged
    packages = ", ".join(f"{name} {number}" for name, number in environment.get("packages", {}).items())
    page.table(
        ["", ""],
        [
            ("state", state),
            (
                "length",
                f"{steps} steps of {batch} images: {steps * batch:,} images seen",
            ),
            ("last loss", f"{last['loss']:.4f}" if last else "nothing logged yet"),
            ("speed", f"{sum(speeds) / len(speeds):.1f} images per second" if speeds else ""),
            ("ranks, device", f"{environment.get('world_size', '?')}, {environment.get('device', '?')}"),
            ("precision, ZeRO stage", f"{config.train.precision}, {config.train.zero_stage}"),
            ("dataset snapshot", config.data.snapshot),
            ("versions", packages),
        ],
    )


def add_curves(page: Page, records: Sequence[Result]) -> None:
    """Draw what was logged: losses first, then every other group of values, each in a panel."""
    page.heading("Loss curves")
    if not records:
        page.text("Nothing is logged yet.")
        return
    names = dict.fromkeys(name for record in records for name in record)
    losses = [name for name in names if name == "loss" or name.startswith("loss/")]
    guards = [name for name in names if name.startswith("guard/")]
    quiet = {name for name in guards if not any(record.get(name) for record in records)}
    panels: dict[str, list[str]] = {name: [name] for name in losses}
    for name in names:
        group, slash, _ = name.partition("/")
        measured = group not in ("loss", "time") if slash else name in SINGLE
        if measured and name not in quiet:
            panels.setdefault(group, []).append(name)
    panels["lr"] = ["lr", *panels.pop("lr", [])]
    page.text("Each point is a mean over the steps since the one before.")
    if guards and len(quiet) == len(guards):
        page.text("No guard acted: no step was skipped, no loss was called a spike.")
    titled = {group if len(members) > 1 else members[0]: members for group, members in panels.items()}
    page.gallery(
        [(curve_figure(records, title, members), "") for title, members in titled.items()], columns=3
    )


def add_cka(page: Page, result: CkaResult | None) -> None:
    """Draw CKA of the full image with each of its parts."""
    page.heading("Similarity to the full image (CKA)")
    if result is None:
        page.text("Not measured: frepa evaluate cka RUN IMAGES --out FILE, then frepa report RUN --cka FILE.")
        return
    page.text(
        "Debiased linear CKA of the features of the full image with those of a part of it: 1 where the part "
        "says all, 0 where nothing is shared. Lines are 95% intervals by the jackknife over images; they "
        "are too narrow where images overlap or repeat patients. Filters are Gaussian, at "
        f"{result.config.cutoff_cycles:g} cycles per image side."
    )
    for modality in dict.fromkeys(row.modality for row in result.rows):
        rows = [row for row in result.rows if row.modality == modality]
        figure = intervals_figure(
            [row.variant for row in rows],
            [row.cka for row in rows],
            [row.interval() for row in rows],
            xlabel="CKA with the full image",
            limits=(0.0, 1.0),
        )
        page.figure(figure, f"{modality}, n = {rows[0].num_images} images, {result.encoder}")


def add_probes(page: Page, probes: Sequence[ProbeResult]) -> None:
    """Draw the AUROC of each probe with its interval, and say what it stands on."""
    page.heading("Probe")
    if not probes:
        page.text(
            "Not measured: frepa evaluate probe RUN IMAGES --out FILE, then frepa report RUN --probe FILE."
        )
        return
    if any(probe.smoke_test for probe in probes):
        page.note(
            "This probe is a smoke test: its labels are not medical. It shows that the evaluation runs; "
            "no methods are compared by it."
        )
    figure = intervals_figure(
        [probe.encoder if len(probes) > 1 else "AUROC" for probe in probes],
        [probe.auroc.value for probe in probes],
        [(probe.auroc.low, probe.auroc.high) for probe in probes],
        xlabel="AUROC (dashed: chance)",
        limits=(0.4, 1.0),
        reference=0.5,
        bars=False,
    )
    page.figure(figure, "Area under the ROC curve on the test part, 95% bootstrap interval.")
    names = list(dict.fromkeys(name for probe in probes for name in probe.measures))
    page.table(
        ["encoder", *(SHOWN.get(name, name) for name in names)],
        [
            (
                probe.encoder,
                *(probe.measures[name].describe() if name in probe.measures else "" for name in names),
            )
            for probe in probes
        ],
    )
    page.table(
        ["encoder", "head", "classes (train + test)", "split", "resampled"],
        [
            (
                probe.encoder,
                f"{probe.head} {probe.describe_choice()}".strip(),
                _describe_classes(probe),
                f"transfer to {probe.transfer.images}" if probe.transfer else probe.split,
                probe.resampled,
            )
            for probe in probes
        ],
    )
    for probe in probes:
        found = f"Leakage, {probe.encoder}: {probe.leakage}."
        (page.note if "allowed" in probe.leakage else page.text)(found)


def _describe_classes(probe: ProbeResult) -> str:
    parts = zip(probe.classes, probe.num_train, probe.num_test, strict=True)
    return ", ".join(f"{name} {train} + {test}" for name, train, test in parts)


def add_time(page: Page, records: Sequence[Result]) -> None:
    """Draw where the time of a step goes."""
    page.heading("Time by phase")
    timed = [record for record in records if "time/total" in record]
    if not timed:
        page.text("Nothing is logged yet.")
        return
    # the first line counts the start of loaders and kernels
    timed = timed[1:] or timed
    names = dict.fromkeys(name for record in timed for name in record if name.startswith("time/"))
    means = {name.removeprefix("time/"): sum(r.get(name, 0.0) for r in timed) / len(timed) for name in names}
    total = means.pop("total")
    means["other"] = max(0.0, total - sum(means.values()))
    page.figure(phases_figure(means), "Mean of rank 0 over the run, the first line left out.")
    page.table(
        ["phase", "seconds per step", "share"],
        [(name, seconds, f"{seconds / total:.1%}") for name, seconds in means.items()],
    )


def add_places(page: Page, run_dir: Path, config: RunConfig) -> None:
    """Say where things are."""
    page.heading("Where things are")
    rows = [(name, text) for name, text in PLACES if (run_dir / name).is_file()]
    try:
        newest = find_checkpoint(run_dir).name
        rows.append((f"{CHECKPOINTS}/{newest}/{STUDENT_WEIGHTS}", "the newest weights of the student"))
    except DataError:
        pass
    page.text(
        f"The run is in {run_dir}, its dataset in {config.data.root}. Names in the table are below the run."
    )
    page.table(["file", "what it holds"], rows)
