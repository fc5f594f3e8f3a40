"""MAE beside RetMAE on real fundus images: same steps, same data, several seeds, probed on a held-out split.

    python tools/compare_methods.py FUNDUS_ODIR OUT --steps 300 --seeds 0 1 2 --set method.model.size=tiny

FUNDUS_ODIR holds `labels.csv` with filename, split, patient, N and D (ODIR-5K's layout). Pretraining
reads the images of the train split without labels. The task is diabetic retinopathy (D = 1) against normal
(N = 1), split by patient. Random initialization stands beside as the floor. Prints a table of AUROCs with
the spread over seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

FREPA = str(Path(sys.executable).with_name("frepa"))


def run(*arguments: str) -> None:
    """Run a `frepa` command, shown first."""
    print("$ frepa", *arguments, file=sys.stderr, flush=True)
    subprocess.run([FREPA, *arguments], check=True, stdout=sys.stderr)


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


def probe(encoder: str, images: Path, task: Path, out: Path) -> float:
    """AUROC of a linear probe."""
    if not out.is_file():
        run("evaluate", "probe", encoder, str(images), "--labels", str(task), "--out", str(out))
    return float(json.loads(out.read_text(encoding="utf-8"))["auroc"])


def main() -> None:
    """Build, train, probe, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--limit", type=int, default=10**9, help="most images of the labelled task")
    parser.add_argument("--image-size", type=int, default=224, help="side of the views, multiple of 16")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    shards, task = out / "shards", out / "task.csv"
    labels = arguments.images / "labels.csv"
    write_task(labels, task, arguments.limit)
    run(
        *("shards", "build", str(arguments.images), str(shards), "--modality", "fundus", "--size", "256"),
        *("--labels", str(labels), "--set", 'splits=["train"]'),
    )
    scores: dict[str, list[float]] = {"random": [], "mae": [], "retmae": []}
    for seed in arguments.seeds:
        scores["random"].append(probe("random:tiny", arguments.images, task, out / "random.json"))
        for method in ("mae", "retmae"):
            folder = out / f"{method}-{seed}"
            settings = [f"data.root={shards}", f"output={folder}", f"train.seed={seed}"]
            settings += [f"train.steps={arguments.steps}", f"method.model.image_size={arguments.image_size}"]
            settings += arguments.overrides
            if not (folder / "outcome.json").is_file():
                sets = [part for setting in settings for part in ("--set", setting)]
                run("pretrain", "--config", f"demo/{method}", *sets)
            scores[method].append(probe(str(folder), arguments.images, task, out / f"{method}-{seed}.json"))
    print(f"| method | AUROC by seed {arguments.seeds} | mean | standard deviation |")
    print("|---|---|---|---|")
    for method, values in scores.items():
        spread = statistics.stdev(values) if len(set(values)) > 1 else 0.0
        listed = ", ".join(f"{value:.3f}" for value in values)
        print(f"| {method} | {listed} | {statistics.mean(values):.3f} | {spread:.3f} |")


if __name__ == "__main__":
    main()
