"""`make demo`: images -> shards -> pretraining -> evaluation -> export -> report, by the `frepa` command.

Every step prints the command it runs, so that it can be run again by hand with one's own data.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from demo_images import write_demo_images

from cluster.launch import default_num_ranks

FREPA = str(Path(sys.executable).with_name("frepa"))
DEFAULT_NOTE = (
    "Pretrained on overlapping crops of two images: this page shows that the pipeline runs, not what a "
    "method is worth."
)


def run(*arguments: str) -> None:
    """Run a `frepa` command, shown first; stop the demo with its exit code when it fails."""
    print(f"\n$ frepa {shlex.join(arguments)}", flush=True)
    code = subprocess.run([FREPA, *arguments], check=False).returncode
    if code:
        sys.exit(code)


def class_folders(folder: Path) -> list[Path]:
    """Subfolders that may be classes."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def build_own(data: Path, shards: Path, modality: str) -> tuple[Path, list[str]]:
    """Shards of a folder of the user's; returns the images to probe on and the notes of the page."""
    labels = "folder" if len(class_folders(data)) > 1 else "none"
    run(
        "shards", "build", str(data), str(shards), "--modality", modality, "--size", "256", "--labels", labels
    )
    if labels == "folder":
        return data, []
    return data, ["No probe: it needs at least two subfolders, one per class."]


def build_default(images: Path, shards: Path) -> tuple[Path, list[str]]:
    """Shards of the images that scikit-image ships."""
    print(f"cutting scikit-image's retina and histology images into crops: {write_demo_images(images)}")
    for modality in ("fundus", "histopathology"):
        run(
            *("shards", "build", str(images / modality), str(shards)),
            *("--modality", modality, "--size", "256", "--source-name", "skimage"),
        )
    return images, [DEFAULT_NOTE]


def main() -> None:
    """Run the whole path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of images; default: those that scikit-image ships")
    parser.add_argument("--modality", default="fundus", help="what the images of --data are")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where everything goes")
    parser.add_argument("--steps", type=int, help="optimizer steps; default: those of demo/retmae.yaml")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if arguments.data is not None and not arguments.data.is_dir():
        sys.exit(
            f"frepa: error: {arguments.data}: no such folder; to mend it: make demo DATA=a/folder/of/images"
        )
    for old in (out, out.with_name(out.name + ".state")):
        shutil.rmtree(old, ignore_errors=True)
    start = time.monotonic()

    shards, trained, encoder = out / "shards", out / "run", out / "encoder"
    if arguments.data is None:
        images, notes = build_default(out / "images", shards)
    else:
        images, notes = build_own(arguments.data, shards, arguments.modality)
    run("shards", "stats", str(shards), "--out", str(out / "dataset.html"))

    settings = [f"data.root={shards}", f"output={trained}"]
    if arguments.steps:
        settings += [f"train.steps={arguments.steps}"]
    sets = [part for setting in settings for part in ("--set", setting)]
    num_ranks = min(2, default_num_ranks())  # the demo's batch is made for one or two
    run("pretrain", "--config", "demo/retmae", "--num-ranks", str(num_ranks), *sets)

    page = ["report", str(trained), "--out", str(out / "report.html"), "--cka", str(out / "cka.json")]
    run("evaluate", "cka", str(trained), str(shards), "--num", "256", "--out", str(out / "cka.json"))
    if len(class_folders(images)) > 1:
        # the images that it was pretrained on, knowingly: the report says so
        smoke_test = ["--allow-leakage", *(["--smoke-test"] if arguments.data is None else [])]
        run("evaluate", "probe", str(trained), str(images), "--out", str(out / "probe.json"), *smoke_test)
        page += ["--probe", str(out / "probe.json")]
    run("export", str(trained), str(encoder))
    run(*page, *(part for note in notes for part in ("--note", note)))

    print(
        f"""
Done in {time.monotonic() - start:.0f} s. Look at:
  {out / "report.html"}      curves, reconstructions, spectra, HF tokens, CKA, probe
  {out / "dataset.html"}     what the dataset holds, images with their HF tokens marked
  {encoder}/           the encoder: timm.create_model("local-dir:{encoder}", pretrained=True)
Next, with your own images (a folder of PNG, JPEG or TIFF; subfolders as classes give a probe):
  make demo DATA=path/to/images
  frepa shards build path/to/images my/shards --modality fundus
  frepa pretrain --config retmae/vit_b --set data.root=my/shards --set output=runs/mine"""
    )


if __name__ == "__main__":
    main()
