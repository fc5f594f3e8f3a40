"""A study on real images: methods, or terms of a method, on and off, over several seeds.

    python tools/ablate.py DATA OUT --steps 300 --seeds 0 1 2 --image-size 128
    python tools/ablate.py DATA OUT --variants mae retmae random_mae --set data.hf_keep=0.25

DATA holds a folder for each modality and in it one for each set of images, with `labels.csv` (filename,
split). Every variant trains on the train split of the sets named by `--sets`, without labels, on the same
images with the same steps and seeds. Images of the test split are then reconstructed (`frepa evaluate
reconstruct`), and where `fundus/odir5k` is among the sets, a linear probe tells diabetic retinopathy (D = 1)
from normal (N = 1), split by patient. Prints a Markdown table: mean and standard deviation over seeds, and
the difference to the first variant, seed by seed. Started again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FREPA = str(Path(sys.executable).with_name("frepa"))
LABELED = "fundus/odir5k"

# what makes the shipped configs small enough for a study; `--set` has the last word
SMALL = (
    "data.num_workers=0",
    "data.crop_scale=[0.4, 1.0]",
    "train.epochs=null",
    "train.global_batch_size=32",
    "train.micro_batch_size=16",
    "train.base_learning_rate=4e-3",
    "train.warmup_fraction=0.1",
    "train.gradient_clipping=1.0",
    "train.precision=fp32",
    "train.checkpoint_every=1000000",
    "train.keep_checkpoints=1",
)
UNTRAINED = ("train.steps=1", "train.base_learning_rate=1e-12")  # of the variants named random
FREPA_BASE = ("method.model.backbone=vit_tiny", "method.hfl=null", "method.consistency=null")
ALL_TERMS = (
    "method.hfl={}",
    "method.consistency={}",
    "method.adversarial_image={}",
    "method.adversarial_embedding={}",
)
FREPA_CONFIG, MAE = "frepa/vit_b_17m", "frepa/mae_vit_b_17m"

# name: config, settings
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "base": (FREPA_CONFIG, FREPA_BASE),  # root mean squared error and gradient
    "hfl": (FREPA_CONFIG, (*FREPA_BASE, ALL_TERMS[0])),
    "consistency": (FREPA_CONFIG, (*FREPA_BASE, ALL_TERMS[1])),
    "adversarial_image": (FREPA_CONFIG, (*FREPA_BASE, ALL_TERMS[2])),
    "adversarial_embedding": (FREPA_CONFIG, (*FREPA_BASE, ALL_TERMS[3])),
    "all": (FREPA_CONFIG, (*FREPA_BASE, *ALL_TERMS)),
    "random": (FREPA_CONFIG, FREPA_BASE),
    "zero_masking": (FREPA_CONFIG, (*FREPA_BASE, "method.corruption.kinds={zero: 0.5, frequency: 0.5}")),
    "focal": (FREPA_CONFIG, (*FREPA_BASE, "method.focal={}")),
    "mfm": ("frepa/mfm_vit_b_17m", ("method.model.backbone=vit_tiny",)),
    "mae": (MAE, ("method.model.size=tiny",)),
    "mae_pixels": (MAE, ("method.model.size=tiny", "method.norm_pix_loss=false")),
    "retmae": ("retmae/vit_b", ("method.model.size=tiny",)),
    "random_mae": (MAE, ("method.model.size=tiny",)),
}
DEFAULT_VARIANTS = list(VARIANTS)[:9]


def run(*arguments: str) -> None:
    """Run a `frepa` command, shown first; stop with its exit code when it fails."""
    print("$ frepa", *arguments, file=sys.stderr, flush=True)
    code = subprocess.run([FREPA, *arguments], check=False, stdout=sys.stderr).returncode
    if code:
        sys.exit(code)


def write_task(source: Path, task: Path, limit: int) -> None:
    """Rows that are either normal or have retinopathy, labeled so; `limit` of them, drawn by a fixed seed."""
    with source.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["N"] == "1") != (row["D"] == "1")]
    rows = random.Random(0).sample(rows, min(limit, len(rows)))
    with task.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "label", "split", "patient"])
        for row in rows:
            label = "retinopathy" if row["D"] == "1" else "normal"
            writer.writerow([row["filename"], label, row["split"], row["patient"]])


def build_shards(data: Path, sets: Sequence[str], split: str, root: Path, size: int) -> None:
    """Shards of one split of all sets that have it."""
    done = root.with_name(f"{root.name}.done")
    if done.is_file():
        return
    for name in sets:
        labels = data / name / "labels.csv"
        with labels.open(newline="", encoding="utf-8") as file:
            if not any(row["split"] == split for row in csv.DictReader(file)):
                continue
        modality, _, source = name.partition("/")
        run(
            *("shards", "build", str(data / name), str(root), "--modality", modality, "--size", str(size)),
            *("--source-name", source, "--labels", str(labels), "--set", f'splits=["{split}"]'),
        )
    done.touch()


def train(folder: Path, variant: str, settings: Sequence[str], num_ranks: int) -> None:
    """Train one run, go on with it, or leave it when it is done."""
    outcome = folder / "outcome.json"
    if outcome.is_file() and json.loads(outcome.read_text(encoding="utf-8"))["outcome"] == "done":
        return
    if list(folder.glob("checkpoints/step-*/manifest.json")):
        run("resume", str(folder), "--num-ranks", str(num_ranks))
        return
    shutil.rmtree(folder, ignore_errors=True)
    config, own = VARIANTS[variant]
    last = UNTRAINED if variant.startswith("random") else ()
    items = (*SMALL, *own, *settings, *last, f"output={folder}")
    sets = [part for item in items for part in ("--set", item)]
    run("pretrain", "--config", config, "--num-ranks", str(num_ranks), *sets)


def measure(folder: Path, out: Path, name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """All measures of a trained run by their names."""
    values = {}
    if (task := out / "task.csv").is_file():
        result = out / "results" / f"{name}.probe.json"
        if not result.is_file():
            images = str(arguments.data / LABELED)
            # all runs saw the same images; the result says where these are among them
            known = ("--labels", str(task), "--allow-leakage")
            run("evaluate", "probe", str(folder), images, *known, "--out", str(result))
        values["AUROC"] = float(json.loads(result.read_text(encoding="utf-8"))["measures"]["auroc"]["value"])
    result = out / "results" / f"{name}.reconstruct.json"
    if not result.is_file():
        heldout = str(out / "shards-test")
        run(
            *("evaluate", "reconstruct", str(folder), heldout, "--num", str(arguments.num)),
            *("--out", str(result)),
        )
    rows: dict[str, list[float]] = {}
    for row in json.loads(result.read_text(encoding="utf-8"))["rows"]:
        borrowed = ", tone borrowed from the truth" if row["note"] else ""  # not to be compared with others
        key = f"error of detail, {row['corruption']}{borrowed}"
        rows.setdefault(key, []).append(row["high_band"]["mean"])
    return values | {key: statistics.fmean(modalities) for key, modalities in rows.items()}


def mean_and_deviation(values: Sequence[float]) -> str:
    """In three digits; one value has no deviation."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def format_table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a row for each variant, a column for each measure that two of them have (of one, all).

    Args:
        results: by variant, the measures of each seed; the first variant is what others are compared to.
    """
    measures = list(dict.fromkeys(key for seeds in results.values() for key in seeds[0]))
    least = min(2, len(results))
    measures = [key for key in measures if sum(key in seeds[0] for seeds in results.values()) >= least]
    reference = next(iter(results))
    head = ["variant", *(part for key in measures for part in (key, f"difference to {reference}"))]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for variant, seeds in results.items():
        cells = [variant]
        for key in measures:
            cells.append(mean_and_deviation([seed[key] for seed in seeds]) if key in seeds[0] else "")
            paired = variant != reference and key in seeds[0] and key in results[reference][0]
            pairs = zip(seeds, results[reference], strict=True)
            cells.append(mean_and_deviation([a[key] - b[key] for a, b in pairs]) if paired else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pin_study(out: Path, study: dict[str, Any]) -> None:
    """Write down what all runs of the study share; stop where the folder holds another study."""
    path = out / "study.json"
    if path.is_file() and (old := json.loads(path.read_text(encoding="utf-8"))) != study:
        changed = ", ".join(f"{key} {old.get(key)}" for key in study if old.get(key) != study[key])
        sys.exit(f"{out} holds a study with {changed}: name another folder")
    path.write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sets", nargs="+", default=[LABELED], help="folders below DATA: MODALITY/SET")
    parser.add_argument("--variants", nargs="+", default=DEFAULT_VARIANTS, choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--image-size", type=int, default=224, help="side of the views, multiple of 16")
    parser.add_argument("--stored-size", type=int, default=256, help="short side of the stored images")
    parser.add_argument("--num", type=int, default=64, help="images of a modality to reconstruct")
    parser.add_argument("--limit", type=int, default=10**9, help="most images of the labeled task")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="for all variants")
    return parser.parse_args()


def main() -> None:
    """Build, train, measure, print."""
    arguments = parse_arguments()
    out: Path = arguments.out
    (out / "results").mkdir(parents=True, exist_ok=True)
    shared = ("sets", "steps", "image_size", "stored_size", "num", "limit", "overrides")
    pin_study(out, {key: getattr(arguments, key) for key in shared})
    for split in ("train", "test"):
        build_shards(arguments.data, arguments.sets, split, out / f"shards-{split}", arguments.stored_size)
    if LABELED in arguments.sets:
        write_task(arguments.data / LABELED / "labels.csv", out / "task.csv", arguments.limit)
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in arguments.variants}
    for seed in arguments.seeds:
        for variant in arguments.variants:
            name = f"{variant}-{seed}"
            settings = (
                f"data.root={out / 'shards-train'}",
                f"train.seed={seed}",
                f"train.steps={arguments.steps}",
                f"method.model.image_size={arguments.image_size}",
                *arguments.overrides,
            )
            train(out / name, variant, settings, arguments.ranks)
            results[variant].append(measure(out / name, out, name, arguments))
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"Seeds {arguments.seeds}, {arguments.steps} steps, {', '.join(arguments.sets)}; mean ± standard")
    print("deviation over seeds; differences seed by seed. Detail lies above 13.4 cycles per image side.\n")
    print(format_table(results))


if __name__ == "__main__":
    main()
