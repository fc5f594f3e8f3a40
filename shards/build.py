"""Build a dataset: plan, shard tasks in a process pool, tables and snapshot.

Every step is idempotent and ends with a rename, so that a build killed at any moment and run again gives the
same bytes; what was committed is not done again. A further source extends the dataset with a new snapshot.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from shards.atomic import remove_temporaries, writing_to
from shards.formats import DEFAULT_MAX_PIXELS, HIGHEST_MAX_PIXELS
from shards.hf_tokens import HFParams
from shards.modalities import MODALITIES, find_modality
from shards.plan import Describe, Plan, Salt, create_describer, is_current, load_plan, make_plan, save_plan
from shards.pool import available_cores, run_tasks
from shards.publish import BuildReport, SourceFacts, check_extends, publish
from shards.schema import NAME_PATTERN, load_snapshot
from shards.sources import SourceObject, check_places, create_labeler, list_objects
from shards.state import default_state, lock, open_state
from shards.support.errors import DataError
from shards.support.progress import Progress
from shards.support.settings import Settings, validate
from shards.writer import SampleSpec, ShardResult, ShardTask, read_committed, write_shard


class BuildConfig(Settings):
    """How a source becomes shards.

    Attributes:
        modality: one of `MODALITIES`.
        source: what the shards of this source are called; it enters the dataset.
        size: short side of the canonical images, in pixels; aspect kept, never upscaled.
        patch_size: of the HF tokens, in pixels; the cells of the response map are a quarter of it.
        shard_bytes: about how large a shard becomes; small datasets get smaller ones.
        jobs: worker processes, 0 for one per available core; it does not change the bytes.
        keep_names: put the file names into the dataset.
        state: private folder, DEST.state when None.
        salt: to be used in a fresh state folder instead of a random one.
        hf: changes to the HF parameters of the modality.
        labels: "none", "folder" or the path of a CSV file, see `create_labeler`.
        label_columns: columns of the CSV file that enter the dataset.
        patient_column: column of the CSV file that tells patients apart; it enters salted.
        splits: take only objects labeled with these splits, all when empty.
        max_pixels: larger images are quarantined before they are decoded.
        min_side: images with a shorter side (as decoded) are quarantined.
        min_std: images whose channels all have a lower standard deviation are quarantined, in grey levels.
    """

    modality: str
    source: str = Field(default="images", pattern=NAME_PATTERN, max_length=100)
    size: int = Field(default=512, ge=16, le=8192)
    patch_size: int = Field(default=16, ge=4, multiple_of=4)
    shard_bytes: int = Field(default=256 << 20, gt=0)
    jobs: int = Field(default=0, ge=0)
    keep_names: bool = False
    state: Path | None = None
    salt: str | None = Field(default=None, min_length=16)
    hf: dict[str, Any] = Field(default_factory=dict)
    labels: str = "none"
    label_columns: tuple[str, ...] = ("label", "split")
    patient_column: str = "patient"
    splits: tuple[str, ...] = ()
    max_pixels: int = Field(default=DEFAULT_MAX_PIXELS, gt=0, le=HIGHEST_MAX_PIXELS)
    min_side: int = Field(default=64, ge=1)
    min_std: float = Field(default=1.0, ge=0)

    @field_validator("modality")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in MODALITIES:
            raise ValueError(f"not one of {', '.join(MODALITIES)}")
        return name

    @model_validator(mode="after")
    def _has_whole_patches(self) -> BuildConfig:
        if min(self.size, self.min_side) < self.patch_size:
            raise ValueError("size and min_side must be at least patch_size")
        return self

    @property
    def map_cell(self) -> int:
        """Cell of the response map, in pixels."""
        return self.patch_size // 4

    def hf_params(self) -> HFParams:
        """The modality's HF parameters with the changes."""
        return validate(HFParams, find_modality(self.modality).hf.model_dump() | self.hf, where="hf")

    def published_settings(self) -> dict[str, Any]:
        """What determines the bytes: neither places nor secrets."""
        settings = self.model_dump(mode="json", exclude={"jobs", "state", "salt"})
        settings["hf"] = self.hf_params().model_dump(mode="json")
        settings["labels"] = self.labels if self.labels in ("none", "folder") else "csv"
        return settings


def build_dataset(sources: Sequence[Path], root: Path, config: BuildConfig) -> BuildReport:
    """Build the objects of `sources` into the dataset at `root`, or go on with it, or extend it.

    Args:
        sources: folders and files; together they are one source of the dataset, named `config.source`.
        root: the destination.
        config: the settings.

    Returns:
        What became of the units; `report.snapshot` names the dataset as it is now.

    Raises:
        ConfigError: places or settings that contradict each other or the dataset at `root`.
        DataError: no unit became a sample, or the source changed after it was built.
        EnvironmentFault: a folder cannot be written, is in use, or a worker process died.
    """
    state = config.state or default_state(root)
    check_places(sources, root, state)
    labeler = create_labeler(config.labels, config.label_columns, config.patient_column)
    objects = list_objects(sources)
    with lock(state, mode=0o700):
        salt = open_state(state, config.salt)
        name = f"{config.modality}-{config.source}"
        plan = _obtain_plan(state / f"{name}.plan.parquet", objects, create_describer(labeler, salt), config)
        if plan.num_units == 0:
            raise _no_sample(sources, [item["reason"] for _, item in plan.left_out()])
        with lock(root):
            return _build_planned(sources, root, state / f"{name}.keys.parquet", config, plan, salt)


def _obtain_plan(
    path: Path, objects: Sequence[SourceObject], describe: Describe, config: BuildConfig
) -> Plan:
    """The plan of an earlier, interrupted build where it still holds, else a new one."""
    settings = config.published_settings()
    plan = load_plan(path, settings)
    if plan is None or not is_current(plan, objects, describe):
        plan = make_plan(
            objects,
            describe=describe,
            size=config.size,
            patch_size=config.patch_size,
            splits=config.splits,
            shard_bytes=config.shard_bytes,
        )
        save_plan(path, plan, settings)
    return plan


def _build_planned(
    sources: Sequence[Path], root: Path, private: Path, config: BuildConfig, plan: Plan, salt: Salt
) -> BuildReport:
    """Write the shards of a plan and publish them; both folders are locked."""
    snapshot = load_snapshot(root) if (root / "dataset.json").exists() else None
    facts = _source_facts(config, plan, salt)
    is_published = check_extends(snapshot, facts)
    folder = root / config.modality
    with writing_to(folder):
        folder.mkdir(exist_ok=True)
        if not is_published:  # what an unfinished build of other files or settings may have left
            _remove_shards(folder, config.source, plan.num_shards)
        remove_temporaries(root, root / "snapshots", folder, private.parent)
    try:
        results, num_reused = _write_shards(root, config, facts, plan, salt)
    finally:
        remove_temporaries(folder)  # of workers that were ended
    if all(result.info is None for result in results):
        _remove_shards(folder, config.source, 0)
        reasons = [item["reason"] for _, item in plan.left_out()]
        raise _no_sample(sources, reasons + [bad.reason for result in results for bad in result.bad])
    return publish(root, private, snapshot, facts, plan, salt, results, num_reused)


def _source_facts(config: BuildConfig, plan: Plan, salt: Salt) -> SourceFacts:
    settings = config.published_settings()
    return SourceFacts(
        modality=config.modality,
        source=config.source,
        settings=settings,
        hf=config.hf_params(),
        map_cell=config.map_cell,
        plan_digest=plan.digest(salt, settings),
    )


def _write_shards(
    root: Path, config: BuildConfig, facts: SourceFacts, plan: Plan, salt: Salt
) -> tuple[list[ShardResult], int]:
    """Write the shards that are not committed yet; return the results of all, and how many were."""
    spec = SampleSpec(
        modality=config.modality,
        source=config.source,
        size=config.size,
        patch_size=config.patch_size,
        map_cell=config.map_cell,
        hf=facts.hf,
        max_pixels=config.max_pixels,
        min_side=config.min_side,
        min_std=config.min_std,
        keep_names=config.keep_names,
    )

    def task_of(shard: int) -> ShardTask:
        path = f"{config.modality}/{config.source}-{shard:06d}.tar"
        units = plan.units(shard, salt, config.modality, config.source)
        return ShardTask(root, path, spec, facts.plan_digest, units)

    results: dict[str, ShardResult] = {}
    missing = []
    for shard in range(plan.num_shards):
        task = task_of(shard)
        committed = read_committed(task)
        if committed is None:
            missing.append(shard)
        else:
            results[task.path] = committed
    num_reused = len(results)
    num_left = sum(plan.num_units_of(shard) for shard in missing)
    jobs = min(config.jobs or available_cores(), max(1, len(missing)))
    num_done = plan.num_units - num_left
    with Progress(plan.num_units, f"build {config.modality}", unit="image", initial=num_done) as progress:
        for path, num_units, result in run_tasks(_write_task, map(task_of, missing), jobs):
            results[path] = result
            progress.update(num_units)
    return [results[path] for path in sorted(results)], num_reused


def _write_task(task: ShardTask) -> tuple[str, int, ShardResult]:
    return task.path, len(task.units), write_shard(task)


def _remove_shards(folder: Path, source: str, start: int) -> None:
    """Delete unpublished shards of a source from number `start` on."""
    pattern = re.compile(re.escape(source) + r"-(\d{6})\.(?:tar|index\.parquet)")
    for path in folder.iterdir():
        match = pattern.fullmatch(path.name)
        if match and int(match[1]) >= start:
            path.unlink()


def _no_sample(sources: Sequence[Path], reasons: Sequence[str]) -> DataError:
    counted = ", ".join(f"{reason} {num}" for reason, num in Counter(reasons).most_common())
    return DataError(
        f"no image can be used ({counted})",
        where=", ".join(map(str, sources)),
        allowed="PNG, JPEG, TIFF, BMP, WebP",
        fix="give a folder that holds images, or relax min_side or min_std",
    )
