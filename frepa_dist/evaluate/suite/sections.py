"""The section of one task on the page of a suite: leakage first, then figures, then pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from frepa_dist.evaluate.overlays import LEGEND
from frepa_dist.evaluate.plots import forest_figure
from frepa_dist.evaluate.suite.config import Entry, SuiteConfig
from frepa_dist.evaluate.suite.contrasts import Contrast
from frepa_dist.evaluate.suite.drawings import DRAWERS
from frepa_dist.evaluate.suite.published import find_published
from frepa_dist.evaluate.suite.readings import READERS
from frepa_dist.evaluate.suite.run import Place, Results
from frepa_dist.evaluate.suite.store import Cell, unpack_picture
from frepa_dist.evaluate.suite.summary import Row, TaskSummary
from shards.support.page import Page

OWN = 1  # in a row of pictures, the one that the encoder made; the others are the same for all
MOST_COLUMNS = 5
KINDS = {
    "probe": "Probe: the class of an image from the encoder's features.",
    "label-curve": "Probe with few labels: shares of the training part are drawn, the test part stays.",
    "tokens": "Probe that sees a part of the tokens: of high frequency (HF), of low (LF), random ones.",
    "segment": "Segmentation: a light decoder on the frozen encoder finds masks in whole images.",
    "detect": "Lesions: found at 1/8 to 8 false positives per image.",
    "restore": "Restoration: a light decoder on the frozen encoder restores degraded images.",
    "high-pass": "Probe of raw images, tested on images that lose their low frequencies more and more.",
    "cka": "Similarity (debiased linear CKA) of the features of the image and of a part of it.",
    "layer-cka": "Similarity (debiased linear CKA) of layers with each other, and with bands of frequencies.",
    "reconstruct": "Reconstruction by the run's decoder: relative error above 13.4 cycles per image side.",
    "layer-spectra": "Which frequencies the layers pass: relative log-amplitude of their maps.",
    "volume": "Volumes: a head with attention between slices on the 2D encoder's maps, and the same without.",
    "token-pca": "Tokens as colors: the first three principal components over the tokens of all images.",
}
PICTURES = {
    "segment": f"The first test images. Over the grey picture: {LEGEND}. Black does not count.",
    "detect": "The first test images: heat, and lesions outlined.",
    "restore": "The first test images: degraded, clean, and what is restored from each encoder.",
    "token-pca": "The first images. Like colors are like tokens; colors of two encoders do not compare.",
}


def with_spread(mean: float, deviation: float | None) -> str:
    """A mean and its standard deviation as text."""
    return f"{mean:.3f}" + ("" if deviation is None else f" \N{PLUS-MINUS SIGN} {deviation:.3f}")


def add_task(page: Page, config: SuiteConfig, results: Results, task: TaskSummary, entry: Entry) -> None:
    """Add all about a task."""
    page.heading(task.name)
    head = f" Head: {entry.head}." if hasattr(entry, "head") else ""
    page.text(KINDS[task.kind] + head)
    if task.measure is None:
        page.text("No encoder has a result.")
        return
    add_leakage(page, config, results, task)
    mains = [row for row in task.rows if row.is_main]
    add_main(page, mains, task)
    add_contrasts(page, task.contrasts)
    add_published(page, entry)
    add_others(page, config, task)
    cells = {
        encoder.name: [
            results.cells[place]
            for seed in range(len(encoder.sources))
            if (place := Place(task.name, encoder.name, seed)) in results.cells
        ]
        for encoder in config.encoders
    }
    cells = {name: found for name, found in cells.items() if found}
    if task.kind in DRAWERS:
        read = READERS[task.kind][0].model_validate
        typed = {name: [read(cell.result) for cell in found] for name, found in cells.items()}
        DRAWERS[task.kind](page, typed)
    add_pictures(page, task.kind, cells)


def add_leakage(page: Page, config: SuiteConfig, results: Results, task: TaskSummary) -> None:
    """Whether test images were in the pretraining data, before any figure."""
    said: dict[str, list[str]] = {}
    for encoder in config.encoders:
        found = results.seeds(task.name, encoder)
        by_words: dict[str, list[int]] = {}
        for seed, reading in found.items():
            if reading.leakage is not None:
                by_words.setdefault(reading.leakage, []).append(seed)
        for words, seeds in by_words.items():
            number = "" if len(seeds) == len(found) else f" (seed {', '.join(map(str, seeds))})"
            said.setdefault(words, []).append(encoder.name + number)
    if said:
        rows = [(words, "; ".join(names)) for words, names in said.items()]
        page.table(["test images in the pretraining data", "of"], rows)
    else:
        page.text("Nothing is learned from labels here, so that no test image was looked for.")


def add_main(page: Page, rows: Sequence[Row], task: TaskSummary) -> None:
    """The main measure, encoder by encoder."""
    num = rows[0].num_units
    units = rows[0].unit if num is None else f"{num} {rows[0].unit}"
    page.table(
        ["encoder", task.measure or "", f"95% interval over {units}", "seeds", "seed by seed"],
        [
            (
                row.encoder + (" (unseen)" if row.is_unseen else ""),
                with_spread(row.mean, row.deviation),
                "" if row.low is None or row.high is None else f"[{row.low:.3f}, {row.high:.3f}]",
                str(len(row.by_seed))
                + ("" if len(row.by_seed) == row.num_sources else f" of {row.num_sources}"),
                ", ".join(f"{value:.3f}" for value in row.by_seed) if len(row.by_seed) > 1 else "",
            )
            for row in rows
        ],
    )
    page.figure(
        forest_figure(
            [row.encoder for row in rows],
            [row.mean for row in rows],
            [None if row.low is None or row.high is None else (row.low, row.high) for row in rows],
            [row.by_seed for row in rows],
            xlabel=task.measure or "",
        ),
        f"Mean over seeds with its 95% interval over {units}; circles: seed by seed.",
    )


def add_contrasts(page: Page, contrasts: Sequence[Contrast]) -> None:
    """Differences to the baseline, and how sure they are."""
    if not contrasts:
        return
    page.table(
        [
            f"minus {contrasts[0].baseline}",
            "difference",
            "over test images",
            "p",
            "p, Holm",
            "over seeds: sd, 95% interval",
            "test",
        ],
        [
            (
                found.encoder,
                f"{found.value:+.3f}",
                "" if found.low is None else f"[{found.low:+.3f}, {found.high:+.3f}]",
                "" if found.p is None else f"{found.p:.2g}",
                "" if found.p_holm is None else f"{found.p_holm:.2g}",
                _over_seeds(found),
                found.test,
            )
            for found in contrasts
        ],
    )


def _over_seeds(found: Contrast) -> str:
    if found.deviation is None:
        return "not known"
    return f"{found.deviation:.3f} [{found.seeds_low:+.3f}, {found.seeds_high:+.3f}]"


def add_others(page: Page, config: SuiteConfig, task: TaskSummary) -> None:
    """All other measures, encoders side by side."""
    others = list(dict.fromkeys(row.measure for row in task.rows if not row.is_main))
    known = {(row.measure, row.encoder): row for row in task.rows}
    names = [encoder.name for encoder in config.encoders if task.main_row(encoder.name) is not None]
    rows = []
    for measure in others:
        found = [known.get((measure, name)) for name in names]
        rows.append(
            [measure, *("" if row is None else with_spread(row.mean, row.deviation) for row in found)]
        )
    if rows:
        page.table(["mean \N{PLUS-MINUS SIGN} sd over seeds", *names], rows)


def add_pictures(page: Page, kind: str, cells: Mapping[str, Sequence[Cell]]) -> None:
    """The same test images of all encoders, of each the first source."""
    rows = {name: found[0].pictures for name, found in cells.items() if found[0].pictures}
    if not rows:
        return
    page.text(PICTURES[kind])
    first = next(iter(rows.values()))
    for number, shared in enumerate(first):
        shown = [(unpack_picture(p), p.caption) for at, p in enumerate(shared) if at != OWN]
        for name, found in rows.items():
            own = found[number][OWN]
            shown.append((unpack_picture(own), f"{name}: {own.caption}" if own.caption else name))
        page.gallery(shown, columns=min(len(shown), MOST_COLUMNS))


def add_published(page: Page, entry: Entry) -> None:
    """Figures of others, told apart from what was measured."""
    for key in entry.published:
        table = find_published(key)
        digits = 3 if max(table.figures.values()) <= 1 else 2
        page.table(
            ["published, not measured here", table.measure],
            [(method, f"{value:.{digits}f}") for method, value in table.figures.items()],
        )
        page.text(
            f"Published: {table.title}; {table.source}. Protocol, splits and pretraining data differ from "
            "ours; see How it was measured."
        )
