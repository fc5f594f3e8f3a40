"""Bytes to pixels: PNG, JPEG, TIFF, BMP and WebP become 8-bit arrays, or a reason why not.

Pillow decodes everything: OpenCV is 7 % (JPEG) to 20 % (PNG) faster, but returns a truncated file as an image
with a grey end. Only images of more than 8 bits in several channels, which Pillow cuts to their high bytes,
are decoded by OpenCV after Pillow has found them whole.

What a file says about itself decides, not its suffix. Color profiles are ignored.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from shards.support.errors import DataError

Pixels = npt.NDArray[np.uint8]

REASONS = {
    "zero_bytes": "the file is empty",
    "not_an_image": "the content is of no image format",
    "unsupported_format": "an image or volume format that this version does not read",
    "unreadable_file": "the file cannot be opened",
    "truncated": "the file ends too early",
    "damaged": "the decoder refuses the content",
    "too_many_pixels": "more pixels than `max_pixels`, refused before decoding",
    "too_many_patches": "more patches than a 16-bit index can number",
    "too_small": "a side is shorter than `min_side`",
    "flat": "nearly constant: the standard deviation is below `min_std`",
}
"""Stable reason codes of units that are no samples."""

DEFAULT_MAX_PIXELS = 100_000_000
HIGHEST_MAX_PIXELS = 178_000_000  # Pillow refuses more by itself (2 x its MAX_IMAGE_PIXELS)
PERCENTILES = (0.5, 99.5)  # of images of more than 8 bits: these values become 0 and 255

_ORIENTATION_TAG = 0x0112
_BITS_PER_SAMPLE_TAG = 258
_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", 0, "png"),
    (b"\xff\xd8\xff", 0, "jpeg"),
    (b"II*\x00", 0, "tiff"),
    (b"MM\x00*", 0, "tiff"),
    (b"II+\x00", 0, "tiff"),
    (b"MM\x00+", 0, "tiff"),
    (b"BM", 0, "bmp"),
    (b"WEBP", 8, "webp"),
    (b"GIF8", 0, "gif"),
    (b"DICM", 128, "dicom"),
    (b"\x89HDF", 0, "hdf5"),
    (b"\x93NUMPY", 0, "npy"),
    (b"n+1\x00", 344, "nifti"),
    (b"\x00\x00\x00\x0cjP  ", 0, "jpeg2000"),
)
_PILLOW_NAMES = {"png": "PNG", "jpeg": "JPEG", "tiff": "TIFF", "bmp": "BMP", "webp": "WEBP"}
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".dib", ".webp"})


class Unreadable(DataError):
    """A unit that cannot become a sample; `reason` is one of `REASONS`."""

    def __init__(self, reason: str, detail: str = "", *, where: object = None) -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {REASONS[reason]}" + (f" ({detail})" if detail else ""), where=where)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.reason, self.detail, self.where)


def _rebuild(reason: str, detail: str, where: object) -> Unreadable:
    return Unreadable(reason, detail, where=where)


@dataclass(frozen=True)
class DecodedImage:
    """Pixels, (H, W) or (H, W, 3) RGB, and whether the file's own bytes decode to exactly them."""

    pixels: Pixels
    is_verbatim: bool


@dataclass(frozen=True)
class Header:
    """What a file says of itself before it is decoded."""

    format: str
    num_pages: int
    height: int
    width: int


def sniff(data: bytes) -> str | None:
    """Name the format of a file by its first bytes (352 are enough), None when it is none we know."""
    for magic, offset, name in _MAGIC:
        if data[offset : offset + len(magic)] == magic:
            return name
    return None


def check_format(data: bytes) -> str:
    """Name the format of a file that can be read.

    Raises:
        Unreadable: it is empty, no image, or of a format that this version does not read.
    """
    if not data:
        raise Unreadable("zero_bytes")
    name = sniff(data)
    if name is None:
        raise Unreadable("not_an_image")
    if name not in _PILLOW_NAMES:
        raise Unreadable("unsupported_format", name)
    return name


def read_header(data: bytes) -> Header:
    """Read format, size and number of pages; only TIFF has several (of an animation, the first frame counts).

    Raises:
        Unreadable: it is no image, or its header is damaged.
    """
    name = check_format(data)
    with _decoder_faults(), Image.open(io.BytesIO(data), formats=(_PILLOW_NAMES[name],)) as image:
        pages = int(getattr(image, "n_frames", 1)) if name == "tiff" else 1
        return Header(name, pages, image.height, image.width)


def decode_image(
    data: bytes, name: str = "", *, max_pixels: int = DEFAULT_MAX_PIXELS, page: int = 0
) -> Pixels:
    """Decode one page of an image file to uint8, (H, W) or (H, W, 3) RGB.

    EXIF rotation is applied; palette, CMYK and other color spaces become RGB; transparent pixels are laid on
    black; more than 8 bits are scaled so that the percentiles .5 and 99.5 (over all channels together) become
    0 and 255.

    Args:
        data: the whole file.
        name: what an error calls it.
        max_pixels: larger images are refused from their header, before decoding.
        page: of a TIFF file.

    Raises:
        Unreadable: with a stable reason.
    """
    try:
        return decode_page(data, max_pixels=max_pixels, page=page).pixels
    except Unreadable as error:
        raise Unreadable(error.reason, error.detail, where=name or None) from error


def decode_page(data: bytes, *, max_pixels: int, page: int = 0) -> DecodedImage:
    """Decode as `decode_image` does, and say whether the pixels are verbatim those of the file."""
    format_name = check_format(data)
    with _decoder_faults(), Image.open(io.BytesIO(data), formats=(_PILLOW_NAMES[format_name],)) as image:
        if page:
            image.seek(page)
        if image.width * image.height > max_pixels:
            raise Unreadable("too_many_pixels", f"{image.width} x {image.height}")
        is_deep_color = _is_deep_color(data, image, format_name)
        image.load()
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        if is_deep_color:
            return DecodedImage(_orient(_decode_deep_color(data, format_name, page), orientation), False)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            return DecodedImage(scale_to_8_bit(np.asarray(image)), False)
        if image.has_transparency_data:
            return DecodedImage(_lay_on_black(image), False)
        target = {"L": "L", "1": "L"}.get(image.mode, "RGB")
        plain = image if image.mode == target else image.convert(target)
        is_verbatim = plain is image and orientation == 1 and page == 0
        return DecodedImage(np.ascontiguousarray(plain, dtype=np.uint8), is_verbatim)


def check_pixels(pixels: Pixels, *, min_side: int, min_std: float) -> None:
    """Refuse images that hold nothing to learn from.

    Raises:
        Unreadable: too small, or flat.
    """
    if min(pixels.shape[:2]) < min_side:
        raise Unreadable("too_small", f"{pixels.shape[1]} x {pixels.shape[0]}")
    deviation = float(cv2.meanStdDev(pixels)[1].max())
    if deviation < min_std:
        raise Unreadable("flat", f"standard deviation {deviation:.2f}")


def scale_to_8_bit(values: npt.NDArray[Any]) -> Pixels:
    """Scale so that the percentiles .5 and 99.5 of the finite values become 0 and 255; NaN becomes 0."""
    values = values.astype(np.float32)
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return np.zeros(values.shape, np.uint8)
    low, high = np.percentile(finite, PERCENTILES)
    if high <= low:  # fewer than 1 % of the values differ
        low, high = finite.min(), finite.max()
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-12)
    return np.asarray(np.rint(np.clip(scaled, 0, 1) * 255), np.uint8)


@contextmanager
def _decoder_faults() -> Iterator[None]:
    """Turn what the decoders raise on bad data into `Unreadable`; an error of our own stays one.

    Pillow documents no list: damaged files make it raise anything from OSError to TypeError. So the place
    decides, not the type.
    """
    try:
        yield
    except (Unreadable, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise Unreadable("too_many_pixels") from error
    except Exception as error:
        if not (isinstance(error, cv2.error) or _is_raised_by_pillow(error)):
            raise
        text = str(error).lower()
        is_truncated = isinstance(error, EOFError) or "truncat" in text or "end of file" in text
        raise Unreadable("truncated" if is_truncated else "damaged", type(error).__name__) from error


def _is_raised_by_pillow(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return str(module).split(".")[0] == "PIL"


def _is_deep_color(data: bytes, image: Image.Image, format_name: str) -> bool:
    """Whether the file has several channels of more than 8 bits."""
    if format_name == "png":
        bit_depth, color_type = data[24], data[25]
        return bit_depth == 16 and color_type in (2, 4, 6)
    if format_name == "tiff":
        bits = image.tag_v2.get(_BITS_PER_SAMPLE_TAG)  # type: ignore[attr-defined]
        return isinstance(bits, tuple) and len(bits) > 1 and any(bit in (16, 32, 64) for bit in bits)
    return False


def _decode_deep_color(data: bytes, format_name: str, page: int) -> Pixels:
    buffer = np.frombuffer(data, np.uint8)
    if format_name == "tiff":
        _, pages = cv2.imdecodemulti(buffer, cv2.IMREAD_UNCHANGED, range=(page, page + 1))
        array = pages[0] if pages else None
    else:
        array = cv2.imdecode(buffer, cv2.IMREAD_UNCHANGED)
    if array is None or array.ndim != 3 or array.shape[2] not in (3, 4):
        raise Unreadable("damaged", "of more than 8 bits a channel")
    color = array[:, :, 2::-1].astype(np.float32)
    if array.shape[2] == 4:
        color *= array[:, :, 3:] / np.float32(np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1)
    return scale_to_8_bit(color)


def _orient(pixels: Pixels, orientation: Any) -> Pixels:
    """Apply an EXIF orientation, 1 to 8; anything else that a file may hold means 1."""
    if orientation in (2, 4, 5, 7):
        pixels = pixels[:, ::-1]
        orientation = {2: 1, 4: 3, 5: 8, 7: 6}[orientation]
    return np.ascontiguousarray(np.rot90(pixels, {3: 2, 6: 3, 8: 1}.get(orientation, 0)))


def _lay_on_black(image: Image.Image) -> Pixels:
    is_grey = image.mode in ("L", "LA", "La", "1")
    layers = np.asarray(image.convert("LA" if is_grey else "RGBA"), dtype=np.uint16)
    color, alpha = layers[:, :, :-1], layers[:, :, -1:]
    laid = ((color * alpha + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(laid[:, :, 0] if is_grey else laid)
