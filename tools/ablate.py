"""A study on real images: methods, or terms of a method, on and off, over several seeds.

    python tools/ablate.py DATA OUT --steps 300 --seeds 0 1 2 --image-size 128
    python tools/ablate.py DATA OUT --variants mae retmae random_mae --tasks TASKS.yaml

DATA holds a folder for each modality and in it one for each set of images, with `labels.csv` (filename,
split). Every variant trains on the train split of the sets named by `--sets`, without labels, on the same
images with the same steps and seeds; `frepa evaluate suite` then puts the encoders side by side, the first
variant as the baseline, in OUT/suite. Its tasks are those of `--tasks` (a list as in the config of a suite;
DATA and OUT stand for the folders); without it, reconstructions of the test split, and where `fundus/odir5k`
and `fundus/drive` are in DATA, a probe that tells diabetic retinopathy (D = 1) from normal (N = 1), CKA, and
vessels. Prints Markdown tables: mean and standard deviation over seeds, and the difference to the baseline,
seed by seed. With `--leave-out MODALITY` all modalities are drawn equally often, and every variant is trained
once more without that one (VARIANT-MODALITY); with `--num-images N` on N images too, the same for all
(VARIANT-N), for a curve over the number of images. Started again, it goes on where it stopped; several calls
with `--train-only` share seeds or variants among cores or machines.
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

from ablate_variants import SMALL, UNTRAINED, VARIANTS

from shards.support.settings import dump_yaml, read_config

FREPA = str(Path(sys.executable).with_name("frepa"))
Row = dict[str, str]
LABELED, VESSELS = "fundus/odir5k", "fundus/drive"

DEFAULT_VARIANTS = list(VARIANTS)[:7]


def run(*arguments: str) -> None:
    """Run a `frepa` command, shown first; stop with its exit code when it fails."""
    print("$ frepa", *arguments, file=sys.stderr, flush=True)
    code = subprocess.run([FREPA, *arguments], check=False, stdout=sys.stderr).returncode
    if code:
        sys.exit(code)


def write_labels(source: Path, table: Path, limit: int) -> None:
    """Rows that are either normal or have retinopathy, labeled so; `limit` of them, drawn by a fixed seed."""
    with source.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["N"] == "1") != (row["D"] == "1")]
    rows = random.Random(0).sample(rows, min(limit, len(rows)))
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "label", "split", "patient"])
        for row in rows:
            label = "retinopathy" if row["D"] == "1" else "normal"
            writer.writerow([row["filename"], label, row["split"], row["patient"]])


def list_images(data: Path, sets: Sequence[str], split: str, num: int | None) -> dict[str, list[Row]]:
    """Rows of one split by set; `num` of all of them, drawn by a fixed seed, or all for None."""
    rows: list[tuple[str, Row]] = []
    for name in sets:
        with (data / name / "labels.csv").open(newline="", encoding="utf-8") as file:
            own = [row for row in csv.DictReader(file) if row["split"] == split]
        rows += [(name, {**row, "filename": str((data / name / row["filename"]).resolve())}) for row in own]
    if num is not None:
        rows = random.Random(0).sample(rows, min(num, len(rows)))
    return {name: [row for owner, row in rows if owner == name] for name in sets}


def build_shards(root: Path, images: dict[str, list[Row]], size: int) -> None:
    """Shards of the images of all sets that have any."""
    done = root.with_name(f"{root.name}.done")
    if done.is_file():
        return
    for name, rows in images.items():
        if rows:
            modality, _, source = name.partition("/")
            listing = root.with_name(f"{root.name}-{modality}-{source}.csv")
            with listing.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            run(
                *("shards", "build", str(listing), str(root), "--modality", modality, "--size", str(size)),
                *("--source-name", source),
            )
    done.touch()


def balance(left_out: str | None) -> str:
    """Setting that draws all modalities equally often but for one."""
    return "data.modality_weights={alpha: 0" + (f", {left_out}: 0" if left_out else "") + "}"


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


def choose_tasks(data: Path, out: Path, num: int) -> list[dict[str, Any]]:
    """What every encoder is measured on, where nothing else is asked for."""
    heldout = str(out / "shards-test")
    tasks: list[dict[str, Any]] = [
        {"kind": "reconstruct", "name": "detail that is drawn", "images": heldout, "num": num}
    ]
    if (data / LABELED).is_dir():
        shared = {"modality": "fundus", "images": str(data / LABELED), "labels": str(out / "task.csv")}
        tasks.append({"kind": "probe", "name": "retinopathy", **shared})
        tasks.append({"kind": "cka", "name": "CKA", "modality": "fundus", "images": str(data / LABELED)})
    if (data / VESSELS).is_dir():
        folder = data / VESSELS
        masks = {"images": str(folder), "masks": str(folder / "labels.csv")}
        tasks.append({"kind": "segment", "name": "vessels", "modality": "fundus", **masks})
    return tasks


def read_tasks(path: Path, data: Path, out: Path) -> list[dict[str, Any]]:
    """Tasks of a file, DATA and OUT at the beginning of a value replaced by the folders."""
    folders = {"DATA": data, "OUT": out}

    def place(value: Any) -> Any:
        first, slash, rest = value.partition("/") if isinstance(value, str) else ("", "", "")
        return str(folders[first] / rest) if slash and first in folders else value

    tasks: list[dict[str, Any]] = read_config(path)["tasks"]
    return [{key: place(value) for key, value in task.items()} for task in tasks]


def name_runs(variant: str, arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Runs of a variant, each with the settings that are its own."""
    left_out: str | None = arguments.leave_out
    runs = {variant: [balance(None)] if left_out else []}
    if left_out:
        runs[f"{variant}-{left_out}"] = [balance(left_out)]
    for num in arguments.num_images:
        runs[f"{variant}-{num}"] = [f"data.root={arguments.out / f'shards-train-{num}'}"]
    return runs


def write_suite(path: Path, arguments: argparse.Namespace) -> None:
    """The config that puts all encoders side by side."""
    out: Path = arguments.out
    tasks = choose_tasks(arguments.data, out, arguments.num)
    if arguments.tasks is not None:
        tasks = read_tasks(arguments.tasks, arguments.data, out)
    encoders: list[dict[str, Any]] = []
    for variant in arguments.variants:
        family = {"family": variant} if arguments.num_images else {}
        for name in name_runs(variant, arguments):
            sources = [str(out / f"{name}-{seed}") for seed in arguments.seeds]
            encoders.append({"name": name, "sources": sources, **family})
    for beside in arguments.beside:
        name, _, source = beside.partition("=")
        encoders.append({"name": name, "sources": [source]})
    suite = {
        "title": f"{arguments.steps} steps on {', '.join(arguments.sets)}",
        "output": str(out / "suite"),
        "cache": str(out / "features"),
        # tests are split by patient; look-alikes of other patients are counted on the page
        "allow_leakage": True,
        "encoders": encoders,
        "tasks": tasks,
    }
    path.write_text(dump_yaml(suite), encoding="utf-8")


def mean_and_deviation(values: Sequence[float]) -> str:
    """In three digits; one value has no deviation."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def format_tables(path: Path) -> str:
    """Markdown: of each task a row for each encoder, its measures and their differences to the first encoder.

    Args:
        path: `values.csv` of a suite.
    """
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}  # by task, measure, encoder and seed
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["state"] == "done":
                encoders = found.setdefault(row["task"], {}).setdefault(row["measure"], {})
                encoders.setdefault(row["encoder"], {})[row["seed"]] = float(row["value"])
    lines = []
    for task, measures in found.items():
        names = list(dict.fromkeys(name for encoders in measures.values() for name in encoders))
        head = [task, *(part for measure in measures for part in (measure, f"difference to {names[0]}"))]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for name in names:
            cells = [name]
            for encoders in measures.values():
                own, first = encoders.get(name, {}), encoders.get(names[0], {})
                common = [seed for seed in own if seed in first and name != names[0]]
                cells.append(mean_and_deviation(list(own.values())) if own else "")
                cells.append(mean_and_deviation([own[s] - first[s] for s in common]) if common else "")
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
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
    parser.add_argument("--beside", action="append", default=[], metavar="NAME=SOURCE", help="one more")
    parser.add_argument("--num-images", type=int, nargs="+", default=[], help="train on so many too")
    parser.add_argument("--leave-out", metavar="MODALITY", help="train each variant without it too")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--image-size", type=int, default=224, help="side of the views, multiple of 16")
    parser.add_argument("--stored-size", type=int, default=256, help="short side of the stored images")
    parser.add_argument("--tasks", type=Path, help="YAML file with the tasks of the suite")
    parser.add_argument("--num", type=int, default=64, help="images of a modality to reconstruct")
    parser.add_argument("--limit", type=int, default=10**9, help="most images of the labeled task")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--train-only", action="store_true", help="leave the suite to a later call")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="for all variants")
    return parser.parse_args()


def main() -> None:
    """Build, train, measure, print."""
    arguments = parse_arguments()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    shared = ("sets", "steps", "image_size", "stored_size", "limit", "overrides", "leave_out")
    pin_study(out, {key: getattr(arguments, key) for key in shared})
    for split, num in (("train", None), ("test", None), *(("train", num) for num in arguments.num_images)):
        root = out / (f"shards-{split}" if num is None else f"shards-{split}-{num}")
        images = list_images(arguments.data, arguments.sets, split, num)
        build_shards(root, images, arguments.stored_size)
    if (arguments.data / LABELED).is_dir():
        write_labels(arguments.data / LABELED / "labels.csv", out / "task.csv", arguments.limit)
    for seed in arguments.seeds:
        for variant in arguments.variants:
            settings = (
                f"data.root={out / 'shards-train'}",
                f"train.seed={seed}",
                f"train.steps={arguments.steps}",
                f"method.model.image_size={arguments.image_size}",
                *arguments.overrides,
            )
            for name, own in name_runs(variant, arguments).items():
                train(out / f"{name}-{seed}", variant, (*settings, *own), arguments.ranks)
    if arguments.train_only:
        return
    write_suite(out / "suite.yaml", arguments)
    run("evaluate", "suite", str(out / "suite.yaml"))
    print(f"Seeds {arguments.seeds}, {arguments.steps} steps, {', '.join(arguments.sets)}; mean ± standard")
    print("deviation over seeds; differences seed by seed. Detail lies above 13.4 cycles per image side.\n")
    print(format_tables(out / "suite" / "values.csv"))


if __name__ == "__main__":
    main()
