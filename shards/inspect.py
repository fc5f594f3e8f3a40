"""Look at a dataset: what it holds, in words, and a sheet of images with their HF tokens marked."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import google_crc32c
import numpy as np
import numpy.typing as npt

from shards.atomic import replace_file
from shards.formats import Pixels, decode_image
from shards.schema import (
    DUPLICATES_SCHEMA,
    QUARANTINE_SCHEMA,
    ShardInfo,
    Snapshot,
    SourceBuild,
    load_snapshot,
    read_index,
    read_table,
)
from shards.support.errors import DataError

KEEP = 0.25  # share of tokens that is marked
_TILE, _GAP, _CAPTION, _PAIRS_PER_ROW = 360, 8, 22, 3  # pixels, but for the last
_MARK = (60, 255, 60)
_PAPER, _INK = 255, 40


def summarize(root: Path) -> list[str]:
    """Describe the current snapshot of a dataset, as lines of text.

    Raises:
        DataError: `root` is no dataset, or a part of it is missing or damaged.
    """
    snapshot = load_snapshot(root)
    quarantine = read_table(root / "quarantine.parquet", QUARANTINE_SCHEMA).to_pylist()
    duplicates = read_table(root / "duplicates.parquet", DUPLICATES_SCHEMA).to_pylist()
    lines = [
        f"{root}: snapshot {snapshot.hash}, written by {snapshot.created_by}",
        f"short side {snapshot.size} px or less, patches of {snapshot.patch_size} px",
    ]
    for build in snapshot.builds:
        shards = [shard for shard in snapshot.shards if _is_of(shard, build)]
        num_bytes = sum(shard.num_bytes for shard in shards)
        name = f"{build.modality}/{build.source}"
        lines.append(
            f"{name}: {build.counts.samples} samples, {len(shards)} shards, {num_bytes / 1e6:.1f} MB"
        )
        lines += [f"  {line}" for line in _describe_images(root, shards)]
        lines.append(f"  HF definition {snapshot.hf_digests[build.modality]}")
        own = [
            row for row in quarantine if (row["modality"], row["source"]) == (build.modality, build.source)
        ]
        lines += _count_lines((row["status"], row["reason"]) for row in own)
        same = [
            row for row in duplicates if (row["modality"], row["source"]) == (build.modality, build.source)
        ]
        lines += _count_lines(("duplicates by", row["kind"]) for row in same)
    return [*lines, f"together: {', '.join(f'{value} {name}' for name, value in snapshot.counts)}"]


def _is_of(shard: ShardInfo, build: SourceBuild) -> bool:
    return (shard.modality, shard.source) == (build.modality, build.source)


def _describe_images(root: Path, shards: list[ShardInfo]) -> Iterator[str]:
    """Ranges of sizes, and how many images are of which kind."""
    columns = ["height", "width", "channels", "image_ext", "source_height", "source_width", "labels"]
    tables = [read_index(root, shard, columns) for shard in shards]
    for prefix, what in (("", "stored"), ("source_", "source")):
        sides = []
        for side in ("width", "height"):
            values = np.concatenate([table[prefix + side].to_numpy() for table in tables])
            low, high = int(values.min()), int(values.max())
            sides.append(str(low) if low == high else f"{low}-{high}")
        yield f"{what} size {' x '.join(sides)} px"
    kinds: Counter[str] = Counter()
    num_labeled = 0
    for table in tables:
        extensions, channels = table["image_ext"].to_pylist(), table["channels"].to_pylist()
        kinds.update(
            f"{'grey' if number == 1 else 'color'} {extension}"
            for extension, number in zip(extensions, channels, strict=True)
        )
        num_labeled += sum(labels != "{}" for labels in table["labels"].to_pylist())
    counted = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    yield f"{counted}; {num_labeled} with labels"


def _count_lines(pairs: Iterator[tuple[str, str]]) -> list[str]:
    return [f"  {kind} {reason}: {number}" for (kind, reason), number in sorted(Counter(pairs).items())]


class _Stored(NamedTuple):
    """One sample of the sheet; `tokens` are all patches, strongest first."""

    caption: str
    pixels: Pixels
    tokens: npt.NDArray[np.uint16]


def contact_sheet(root: Path, out_png: Path, num: int = 24, seed: int = 0) -> None:
    """Draw samples in pairs: as stored, and with the strongest quarter of their tokens outlined.

    Args:
        root: the dataset.
        out_png: where the sheet goes.
        num: how many samples; modalities take turns.
        seed: chooses them.

    Raises:
        DataError: the dataset is missing or damaged.
        EnvironmentFault: `out_png` cannot be written.
    """
    snapshot = load_snapshot(root)
    pairs = []
    for shard, row in _choose(snapshot, num, seed):
        sample = _read(root, shard, row)
        marked = mark_tokens(sample.pixels, sample.tokens, snapshot.patch_size)
        pairs.append(_pair(sample, marked))
    num_rows = -(-len(pairs) // _PAIRS_PER_ROW)
    height, width = pairs[0].shape[:2]
    columns = min(_PAIRS_PER_ROW, len(pairs))
    sheet = np.full((num_rows * height, columns * width, 3), _PAPER, np.uint8)
    for number, pair in enumerate(pairs):
        top, left = number // _PAIRS_PER_ROW * height, number % _PAIRS_PER_ROW * width
        sheet[top : top + height, left : left + width] = pair
    ok, buffer = cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
    assert ok
    with replace_file(out_png) as file:
        file.write(bytes(buffer))


def mark_tokens(
    pixels: Pixels, tokens: npt.NDArray[np.uint16], patch_size: int, keep: float = KEEP, side: int = _TILE
) -> Pixels:
    """Enlarge or shrink an image to a longer side of `side` and outline the first `keep` of its tokens.

    Args:
        pixels: (H, W) or (H, W, 3) RGB.
        tokens: (N,) all patch indices of the image, strongest first.
        patch_size: in pixels of `pixels`.
        keep: share of the tokens that is outlined.
        side: longer side of the result.

    Returns:
        (h, w, 3) RGB; the outline runs around groups of tokens, so that what they hold stays visible.
    """
    height, width = pixels.shape[:2]
    columns, rows = width // patch_size, height // patch_size
    chosen = np.zeros(rows * columns, np.uint8)
    chosen[tokens[: round(keep * len(tokens))]] = 1
    drawn = _fit(pixels, side)
    scale = drawn.shape[1] / width
    grid = cv2.copyMakeBorder(chosen.reshape(rows, columns), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)

    def line(x0: int, y0: int, x1: int, y1: int) -> None:
        start, end = (
            (round(x * patch_size * scale), round(y * patch_size * scale)) for x, y in ((x0, y0), (x1, y1))
        )
        cv2.line(drawn, start, end, _MARK, 2)

    for y, x in np.argwhere(grid[1:, 1:] != grid[1:, :-1]):
        line(x, y, x, y + 1)
    for y, x in np.argwhere(grid[1:, 1:] != grid[:-1, 1:]):
        line(x, y, x + 1, y)
    return drawn


def _choose(snapshot: Snapshot, num: int, seed: int) -> list[tuple[ShardInfo, int]]:
    """Draw samples without repetition, modalities taking turns."""
    generator = np.random.default_rng(seed)
    queues = []
    for modality in snapshot.modalities:
        shards = [shard for shard in snapshot.shards if shard.modality == modality]
        ends = np.cumsum([shard.num_samples for shard in shards])
        drawn = generator.choice(int(ends[-1]), size=min(num, int(ends[-1])), replace=False)
        places = [(int(np.searchsorted(ends, number, side="right")), int(number)) for number in drawn]
        queues.append(
            [
                (shards[place], number - int(ends[place]) + shards[place].num_samples)
                for place, number in places
            ]
        )
    turns = [queue[turn] for turn in range(num) for queue in queues if turn < len(queue)]
    return turns[:num]


def _read(root: Path, shard: ShardInfo, row: int) -> _Stored:
    """Read the image and the ranked tokens of one sample, checked against the index."""
    item = read_index(root, shard).slice(row, 1).to_pylist()[0]
    path = root / shard.path
    where = f"{path}, sample {item['key']}"
    members = {}
    try:
        with path.open("rb") as file:
            for name in ("image", "hf"):
                data = os.pread(file.fileno(), item[f"{name}_size"], item[f"{name}_offset"])
                if google_crc32c.value(data) != item[f"{name}_crc32c"]:
                    raise DataError(f"the bytes of {name} are damaged", where=where, fix="build again")
                members[name] = data
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=where, fix="restore the shard") from error
    return _Stored(
        caption=f"{shard.modality} {item['key'][:8]} {item['width']}x{item['height']}",
        pixels=decode_image(members["image"], where),
        tokens=np.load(io.BytesIO(members["hf"]), allow_pickle=False),
    )


def _fit(pixels: Pixels, side: int) -> Pixels:
    """Scale to a longer side of `side`, as RGB."""
    scale = side / max(pixels.shape[:2])
    size = tuple(max(1, round(length * scale)) for length in pixels.shape[1::-1])
    fitted = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    return np.asarray(cv2.cvtColor(fitted, cv2.COLOR_GRAY2RGB) if fitted.ndim == 2 else fitted, np.uint8)


def _pair(sample: _Stored, marked: Pixels) -> Pixels:
    """The plain and the marked image side by side over a caption."""
    canvas = np.full((_TILE + _CAPTION + _GAP, 2 * (_TILE + _GAP), 3), _PAPER, np.uint8)
    for number, picture in enumerate((_fit(sample.pixels, _TILE), marked)):
        height, width = picture.shape[:2]
        left = number * (_TILE + _GAP) + (_TILE - width) // 2
        top = (_TILE - height) // 2
        canvas[top : top + height, left : left + width] = picture
    place = (4, _TILE + _CAPTION - 6)
    cv2.putText(canvas, sample.caption, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (_INK,) * 3, 1, cv2.LINE_AA)
    return canvas
