"""Search the HF parameters of a modality on images with masks: `frepa shards tune-hf`.

What is sought: the kept tokens hold as much of the mask (vessels, lesions) as they can. An image's recall is
its mask pixels in kept patches over those in the best choice of as many patches. Groups (cameras) count the
same whatever their size; worse copies of the images count by `worse_weight`, so that noise is not taken for
detail. The search sees a part of the images; the figures to believe are those of the other part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from shards.hf.modalities import find_modality
from shards.hf.tokens import HFParams
from shards.stores.atomic import replace_text
from shards.support.errors import DataError, EnvironmentFault
from shards.support.progress import Progress, track
from shards.support.settings import Settings, dump_yaml, validate
from shards.tune.masked import SEARCH, VALIDATION, MaskedImage, assign_parts, list_masked, load_masked
from shards.tune.recall import (
    BEST,
    DEFAULT,
    GRADIENT,
    IDEAL,
    KEPT_SHARES,
    RANDOM,
    Float64,
    measure,
    measure_random,
    objective,
    random_curve,
    recall_curve,
    respond_by,
    respond_by_gradient,
)

if TYPE_CHECKING:
    import optuna

BEST_FILE, PAGE_FILE = "best.yaml", "tune-hf.html"


class TuneConfig(Settings):
    """How parameters are searched.

    Attributes:
        modality: whose parameters are the start, and keep their channel and field of view.
        trials: sets of parameters to try.
        seed: of the search, the drawn parts and the worse copies.
        size: shorter side of the images in pixels; the parameters themselves scale with it.
        patch_size: of the tokens, in pixels.
        keep: share of tokens whose recall is maximized.
        validation: share of a group that the search does not see, where its files name no splits.
        hold_out: groups that the search does not see at all.
        group_column: column of the tables that names the group, such as the camera.
        worse_weight: of the worse copies in what is maximized, 0 for none.
        hf: changes to the modality's parameters, before the search.
    """

    modality: str
    trials: int = Field(default=100, ge=1)
    seed: int = Field(default=0, ge=0)
    size: int = Field(default=224, ge=16, le=8192)
    patch_size: int = Field(default=16, ge=2)
    keep: float = Field(default=0.25, gt=0, le=1)
    validation: float = Field(default=0.3, gt=0, lt=1)
    hold_out: tuple[str, ...] = ()
    group_column: str = "group"
    worse_weight: float = Field(default=0.25, ge=0, lt=1)
    hf: dict[str, Any] = Field(default_factory=dict)

    def start(self) -> HFParams:
        """The parameters that the search starts from."""
        return validate(HFParams, find_modality(self.modality).hf.model_dump() | self.hf, where="hf")


@dataclass(frozen=True)
class TuneResult:
    """What a search found.

    Attributes:
        config: how it was done.
        best: the parameters with the highest objective on the search part.
        images: n of them, with `parts`, "search" or "validation".
        parts: of each image.
        recalls: of each way, (n, 3): recall over the best possible on the image and its two worse copies.
        curves: of each way and "best possible", mean recall on the validation part at `KEPT_SHARES`.
        objectives: of each trial.
        tried: the changes of each trial.
        left_out: images without a mask, or with an empty one.
    """

    config: TuneConfig
    best: HFParams
    images: list[MaskedImage]
    parts: list[str]
    recalls: dict[str, Float64]
    curves: dict[str, Float64]
    objectives: list[float]
    tried: list[dict[str, Any]]
    left_out: list[str] = field(default_factory=list)

    @property
    def groups(self) -> list[str]:
        """Groups in the order of the files."""
        return list(dict.fromkeys(image.file.group for image in self.images))

    def select(self, part: str, group: str | None = None) -> list[int]:
        """Indices of the images of a part, and of a group of it."""
        return [
            index
            for index, image in enumerate(self.images)
            if self.parts[index] == part and group in (None, image.file.group)
        ]

    def rows(self, part: str) -> list[tuple[str, str, int, float, float, float, float]]:
        """Group, way, images, mean, 5th percentile, minimum; and the mean of the worse copies."""
        found = []
        for group in [*self.groups, None]:
            chosen = self.select(part, group)
            if not chosen or (group is None and len(self.groups) == 1):
                continue
            for way, values in self.recalls.items():
                clean, worse = values[chosen, 0], values[chosen, 1:]
                low, least = float(np.percentile(clean, 5)), float(clean.min())
                name = group or "all"
                found.append((name, way, len(chosen), float(clean.mean()), low, least, float(worse.mean())))
        return found

    @property
    def gain(self) -> float:
        """Objective of the best on the validation part, less that of the default."""
        chosen = self.select(VALIDATION)
        groups = [self.images[index].file.group for index in chosen]
        best, default = (
            objective(self.recalls[way][chosen], groups, self.config.worse_weight) for way in (BEST, DEFAULT)
        )
        return best - default

    def changes(self) -> dict[str, Any]:
        """The parameters of the best that differ from the modality's own."""
        own = find_modality(self.config.modality).hf.model_dump(mode="json")
        return {key: value for key, value in self.best.model_dump(mode="json").items() if value != own[key]}

    def verdict(self) -> str:
        """One sentence: whether the best is better on images that the search did not see."""
        if self.gain <= 0:
            return f"No gain on the validation part ({self.gain:+.4f}): keep the default."
        return f"On the validation part the best is better than the default by {self.gain:+.4f}."

    def lines(self) -> list[str]:
        """The validation table and the verdict, as text."""
        lines = [f"{'group':16}{'way':10}{'images':>7}{'mean':>8}{'5 %':>8}{'min':>8}{'worse copies':>14}"]
        for group, way, num, mean, low, least, worse in self.rows(VALIDATION):
            lines.append(f"{group:16}{way:10}{num:7}{mean:8.3f}{low:8.3f}{least:8.3f}{worse:14.3f}")
        if self.left_out:
            lines.append(f"{len(self.left_out)} images left out: no mask, or an empty one")
        return [*lines, self.verdict()]


def tune_hf(
    images: Sequence[Path], out: Path, config: TuneConfig, *, masks: Sequence[Path] = ()
) -> TuneResult:
    """Search, measure, and write `best.yaml` (for `--config`) and `tune-hf.html` into `out`.

    Args:
        images: folders of images, a set each.
        out: folder for the results, created.
        config: how to search.
        masks: for each set a CSV file or a folder of masks; none: `labels.csv` in each folder.

    Raises:
        ConfigError: settings or columns are wrong.
        DataError: images or masks are missing, of another size, or all empty.
        EnvironmentFault: optuna is not installed, or `out` cannot be written.
    """
    from shards.tune.page import write_page  # and with it Matplotlib

    _import_optuna()
    start = config.start()
    loaded, left_out = _load(images, masks, config)
    files = [image.file for image in loaded]
    parts = assign_parts(files, validation=config.validation, hold_out=config.hold_out, seed=config.seed)
    seen, unseen = (
        [image for image, its_part in zip(loaded, parts, strict=True) if its_part == part]
        for part in (SEARCH, VALIDATION)
    )
    best, tried, objectives = search(seen, start, config)
    patch, keep = config.patch_size, config.keep
    ways = {DEFAULT: respond_by(start), BEST: respond_by(best), GRADIENT: respond_by_gradient(start)}
    recalls = {way: measure(loaded, respond, patch, keep) for way, respond in ways.items()}
    recalls[RANDOM] = measure_random(loaded, start, patch, keep)
    curves = {
        way: recall_curve(unseen, respond, patch, KEPT_SHARES)
        for way, respond in ({IDEAL: None} | ways).items()
    }
    curves[RANDOM] = random_curve(unseen, start, patch, KEPT_SHARES)
    result = TuneResult(config, best, loaded, parts, recalls, curves, objectives, tried, left_out)
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / BEST_FILE, _describe(result))
    write_page(result, out / PAGE_FILE)
    return result


def _load(
    images: Sequence[Path], masks: Sequence[Path], config: TuneConfig
) -> tuple[list[MaskedImage], list[str]]:
    """Read all images; and a line for each that is left out."""
    files, left_out = list_masked(images, masks, config.group_column)
    loaded: list[MaskedImage] = []
    for number, file in enumerate(track(files, total=len(files), description="reading")):
        image = load_masked(file, config.size, config.patch_size, config.seed + number)
        if image is None:
            left_out.append(f"{file.image}: no mask pixel inside the field of view")
        else:
            loaded.append(image)
    if not loaded:
        shown = f", such as {left_out[0]}" if left_out else ""
        raise DataError(f"{len(left_out)} images, and no mask with a pixel in it{shown}", where=images[0])
    return loaded, left_out


def search(
    images: Sequence[MaskedImage], start: HFParams, config: TuneConfig
) -> tuple[HFParams, list[dict[str, Any]], list[float]]:
    """Try sets of parameters, the start first, then by optuna's TPE.

    Returns:
        The best parameters, and of each trial the changes and the objective.
    """
    optuna = _import_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # our progress says what its log would
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=config.seed))
    groups = [image.file.group for image in images]
    tried: list[dict[str, Any]] = []
    objectives: list[float] = []
    with Progress(config.trials, "searching", unit="trial") as progress:
        for number in range(config.trials):
            trial = study.ask() if number else None
            changes = suggest(trial, config.size) if trial else {}
            respond = respond_by(start.model_copy(update=changes))
            recalls = measure(images, respond, config.patch_size, config.keep)
            value = objective(recalls, groups, config.worse_weight)
            if trial:
                study.tell(trial, value)
            tried.append(changes)
            objectives.append(value)
            progress.update(note=f"best {max(objectives):.4f}")
    return start.model_copy(update=tried[int(np.argmax(objectives))]), tried, objectives


def suggest(trial: optuna.Trial, size: int) -> dict[str, Any]:
    """Draw what is searched, to three digits; lengths and frequencies reach from the image to its pixels."""

    def number(name: str, low: float, high: float) -> float:
        return float(f"{trial.suggest_float(name, low, high, log=True):.3g}")

    finest = size / 2
    has_log, has_low_pass = (trial.suggest_categorical(name, [True, False]) for name in ("log", "low_pass"))
    return {
        "log_offset": number("log_offset", 0.02, 2.0) if has_log else None,
        "background_sigma": number("background_sigma", 0.01, 0.2),
        "cutoff_cycles": number("cutoff_cycles", min(6.0, finest / 4), min(60.0, finest)),
        "low_pass_cycles": number("low_pass_cycles", finest / 3, 2 * finest) if has_low_pass else None,
        "order": trial.suggest_int("order", 1, 4),
    }


def _describe(result: TuneResult) -> str:
    """`best.yaml`: the changes under `hf:`, and where they come from as a comment."""
    config = result.config
    comment = (
        f"# frepa shards tune-hf: {config.trials} trials, seed {config.seed}, "
        f"{len(result.images)} images at {config.size} px,\n"
        f"# recall in the kept {config.keep:.0%} of {config.patch_size} px patches\n"
        f"# {result.verdict()}\n"
    )
    return comment + dump_yaml({"modality": config.modality, "hf": result.changes()})


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise EnvironmentFault(
            "the search needs the package optuna", fix="pip install 'frepa[tune]'"
        ) from None
    return optuna
