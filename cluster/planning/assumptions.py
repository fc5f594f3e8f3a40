"""What a plan takes for granted: each number that is neither counted nor in the config, with its basis.

A basis begins with `measured`, `published`, `computed`, `design` (of this program) or `guess`. What is given
on the command line replaces its default, and is listed as given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import Field

from cluster.doctor import USABLE_SHARE
from cluster.planning.gpus import Gpu, gpu_fields
from shards.support.settings import Settings, apply_overrides, validate

GIVEN = "given"
Measured = Mapping[str, tuple[float, str]]
"""Value and basis of what a calibration says, by the name of the assumption."""


def _assumed(default: float | None, meaning: str, basis: str, **bounds: Any) -> Any:
    return Field(default, description=meaning, json_schema_extra={"basis": basis}, **bounds)


class Assumptions(Settings):
    """Everything that a plan assumes."""

    gpu: Gpu
    mfu: float = _assumed(
        0.35,
        "model FLOPs utilization: counted operations per second over the dense peak of the data sheet, at "
        "every micro-batch size",
        "guess: 38 to 54 % of the matrix peak were measured for ViT-B on CPU (BENCHMARKS.md); no GPU was "
        "measured",
        gt=0,
        le=1,
    )
    usable_memory: float = _assumed(
        USABLE_SHARE,
        "share of a GPU's memory that may be filled; the rest is for workspaces, fragmentation and the CUDA "
        "context",
        "guess: what `frepa doctor` allows",
        gt=0,
        le=1,
    )
    link_efficiency: float = _assumed(
        0.8, "share of the nominal bandwidth that collectives reach", "guess", gt=0, le=1
    )
    latency_seconds: float = _assumed(1e-5, "of a hop of a collective, of 2 log2(ranks)", "guess", ge=0)
    overlap: float = _assumed(
        0.0,
        "share of the communication that is hidden behind computing",
        "design: the engines leave DeepSpeed's overlap_comm off in stages 0 to 2; careful for stage 3",
        ge=0,
        le=1,
    )
    num_images: int = _assumed(
        17_600_000,
        "images of the dataset, where it cannot be opened",
        "published: the Frepa mix (arXiv 2407.14651)",
        gt=0,
    )
    bytes_per_image: float = _assumed(
        159_000,
        "stored bytes of an image with its HF map, where the dataset cannot be opened",
        "computed: 2.8 TB for 17.6 M images of the Frepa mix (BENCHMARKS.md, Building)",
        gt=0,
    )
    shard_bytes: float = _assumed(
        256 * 2**20,
        "of a shard, where the dataset cannot be opened",
        "design: what `frepa shards build` cuts",
        gt=0,
    )
    loader_images_per_second: float = _assumed(
        585,
        "decoded by a loader process in a second, each on a core of its own",
        "measured: BENCHMARKS.md, Reading (157 KiB images of 512 pixels, a server's CPU core)",
        gt=0,
    )
    cores_per_node: int | None = _assumed(
        None, "CPU cores of a node for loader processes; none: one for each process", "guess", gt=0
    )
    storage_gbit_per_second: float = _assumed(
        10, "network of a node to the dataset's storage", "guess: as in BENCHMARKS.md, Building", gt=0
    )
    s3_gbit_per_second: float | None = _assumed(
        None,
        "what the storage gives all nodes together; none: only the nodes' own networks limit",
        "guess",
        gt=0,
    )
    s3_requests_per_second: float | None = _assumed(
        5500,
        "GET requests that the storage answers all nodes together, for each prefix; a dataset has one for "
        "each modality, an assumed one a single one",
        "published: Amazon S3 user guide, at least 5,500 per second and prefix",
        gt=0,
    )
    checkpoint_bytes_per_second: float = _assumed(
        0.24e9,
        "at which a checkpoint is written",
        "measured: BENCHMARKS.md, 2.14 GB in 8.9 s on two cores; clusters' storage may be faster",
        gt=0,
    )
    checkpoint_stall: float = _assumed(
        0.014,
        "share of a checkpoint's write that training waits for",
        "measured: BENCHMARKS.md, 1.4 % on CPU",
        ge=0,
        le=1,
    )
    gpu_mtbf_hours: float | None = _assumed(
        50_000,
        "mean time between failures that end a run, of a GPU with its share of node and network; failures "
        "are independent and exponential. none: no failures",
        "published: 419 in 54 days of 16,384 H100 is 50,676 h (Llama 3, arXiv 2407.21783, section 3.3.4)",
        gt=0,
    )
    detect_seconds: float = _assumed(
        60, "until a failure is noticed", "measured: RELIABILITY.md, a cut cable between two nodes", ge=0
    )
    hang_share: float = _assumed(0.1, "of failures that are hangs", "guess", ge=0, le=1)
    hang_seconds: float = _assumed(
        600, "until a hang is noticed", "design: the default of --hang-seconds", ge=0
    )
    restart_seconds: float = _assumed(
        180,
        "from then until training goes on, a spare node included; a failure meanwhile starts it over",
        "guess",
        ge=0,
    )
    lost_cache_share: float = _assumed(
        1.0, "of failures after which the node's cache of shards is empty", "guess: careful", ge=0, le=1
    )
    straggler_sigma: float = _assumed(
        0.02,
        "of the logarithm of a rank's time for a step, independent between ranks and steps; all wait for the "
        "slowest",
        "guess",
        ge=0,
    )


class Assumption(NamedTuple):
    """One of them, to be listed."""

    name: str
    value: Any
    meaning: str
    basis: str


def read_assumptions(gpu: str, overrides: Sequence[str], measured: Measured) -> Assumptions:
    """Put together what is assumed.

    Args:
        gpu: short name of a kind of GPU, or `custom`.
        overrides: `key=value` of the user; `gpu.key=value` for the GPU.
        measured: value and basis of what a calibration says; overrides come after it.

    Raises:
        ConfigError: a key or a value is wrong.
    """
    data: dict[str, Any] = {"gpu": gpu_fields(gpu), **{name: value for name, (value, _) in measured.items()}}
    return validate(Assumptions, apply_overrides(data, overrides), where="--assume")


def list_assumptions(
    assumptions: Assumptions, overrides: Sequence[str], measured: Measured
) -> list[Assumption]:
    """All of them, each with where it is from; arguments as of `read_assumptions`."""
    given = {override.partition("=")[0] for override in overrides}
    gpu = assumptions.gpu
    changed = sorted(name for name in given if name.startswith("gpu."))
    listed = [
        Assumption(
            "gpu",
            f"{gpu.name}: {gpu.memory_gb:g} GB, {_peaks(gpu)} TFLOP/s dense, {gpu.link_gb_per_second:g} GB/s "
            f"in its node, {gpu.network_gbit_per_second or 'unknown'} Gbit/s to others",
            "what is bought or rented",
            gpu.source + (f"; {GIVEN}: {', '.join(changed)}" if changed else ""),
        )
    ]
    for name, field in Assumptions.model_fields.items():
        if name == "gpu":
            continue
        extra = field.json_schema_extra
        basis = str(extra["basis"]) if isinstance(extra, dict) else ""
        if name in given:
            basis = GIVEN
        elif name in measured:
            basis = measured[name][1]
        listed.append(Assumption(name, getattr(assumptions, name), field.description or "", basis))
    return listed


def _peaks(gpu: Gpu) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in gpu.tflops.items() if value is not None)
