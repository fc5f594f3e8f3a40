"""PNG, JPEG, TIFF, BMP and WebP: bytes to arrays, or a reason why not.

Pillow decodes everything: OpenCV is 7 % (JPEG) to 20 % (PNG) faster, but returns a truncated file as an image
with a grey end. Only images of more than 8 bits in several channels, which Pillow cuts to their high bytes,
are decoded by OpenCV after Pillow has found them whole.

What a file says about itself decides, not its suffix. Color profiles are ignored.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from shards.formats.common import (
    DEFAULT_MAX_PIXELS,
    Decoded,
    Header,
    Opened,
    Pixels,
    Raw,
    ReadOptions,
    Unreadable,
    decoder_faults,
    quiet,
    readable,
)
from shards.formats.intensity import IntensityRule, to_stored
from shards.formats.magic import HEAD_BYTES, sniff
from shards.stores.blobs import Blob

_ORIENTATION_TAG = 0x0112
_BITS_PER_SAMPLE_TAG = 258
_PHOTOMETRIC_TAG, _WHITE_IS_ZERO = 262, 0
_TILE_WIDTH_TAG = 322
_LARGE_SIDE = 4096  # a tiled TIFF of this side may be a slide
_MAX_IN_MEMORY = 1 << 26  # larger TIFFs are looked into as files, since they may be slides of many GB
_PILLOW_NAMES = {"png": "PNG", "jpeg": "JPEG", "tiff": "TIFF", "bmp": "BMP", "webp": "WEBP"}
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".dib", ".webp"})


def read_header(blob: Blob) -> Header:
    """Read format, size and number of pages; only TIFF has several (of an animation, the first frame counts).

    The first 64 KiB are enough but for TIFF, whose directories may lie anywhere, and for pictures with long
    metadata in front.

    Raises:
        Unreadable: it is no image, or its header is damaged.
    """
    head = blob.head(HEAD_BYTES)
    if check_format(head) != "tiff" and len(head) < blob.num_bytes:
        try:
            return _describe(head)
        except Unreadable as error:
            if error.reason not in ("truncated", "damaged"):
                raise
    return _describe(blob.read())


def open_picture(blob: Blob, options: ReadOptions) -> Opened:
    """Open a picture, whose units are the pages of a TIFF, and one of any other.

    Raises:
        Unreadable: it is no image.
    """
    return _Picture(blob.read(), options)


def is_large_and_tiled(blob: Blob) -> bool:
    """Whether a TIFF is stored in tiles and has a side of 4096 pixels or more, as slides are."""
    with ExitStack() as stack:
        is_small = blob.num_bytes <= _MAX_IN_MEMORY
        file = io.BytesIO(blob.read()) if is_small else stack.enter_context(blob.as_file())
        stack.enter_context(_picture_faults())
        image = stack.enter_context(Image.open(file, formats=("TIFF",)))
        tags = image.tag_v2  # type: ignore[attr-defined]
        return _TILE_WIDTH_TAG in tags and max(image.size) >= _LARGE_SIDE


def check_format(data: bytes) -> str:
    """Name the format of a picture.

    Raises:
        Unreadable: it is empty, no image, or no picture.
    """
    if not data:
        raise Unreadable("zero_bytes")
    name = sniff(data)
    if name is None:
        raise Unreadable("not_an_image")
    if name not in _PILLOW_NAMES:
        raise Unreadable("unsupported_format", name)
    return name


def decode_image(
    data: bytes, name: str = "", *, max_pixels: int = DEFAULT_MAX_PIXELS, page: int = 0
) -> Pixels:
    """Decode one page of a picture to uint8, (H, W) or (H, W, 3) RGB.

    As `decode_page`; more than 8 bits are scaled so that the percentiles .5 and 99.5 (over all channels
    together) become 0 and 255.

    Args:
        data: the whole file.
        name: what an error calls it.
        max_pixels: larger images are refused from their header, before decoding.
        page: of a TIFF file.

    Raises:
        Unreadable: with a stable reason.
    """
    try:
        decoded = decode_page(data, max_pixels=max_pixels, page=page)
    except Unreadable as error:
        raise Unreadable(error.reason, error.detail, where=name or None) from error
    return to_stored(decoded, IntensityRule(kind="as_is")).astype(np.uint8, copy=False)


def decode_page(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, page: int = 0) -> Decoded:
    """Decode one page of a picture: uint8, uint16 or float32, (H, W) or (H, W, 3) RGB.

    EXIF rotation is applied; palette, CMYK and other color spaces become RGB; transparent pixels are laid on
    black.

    Raises:
        Unreadable: with a stable reason.
    """
    return _Picture(data, ReadOptions(max_pixels=max_pixels)).decode(page)


def check_pixels(pixels: Raw, *, min_side: int, min_std: float) -> None:
    """Refuse images that hold nothing to learn from.

    Args:
        pixels: as stored, uint8 or int16.
        min_side: the shorter side, in pixels.
        min_std: standard deviation of the channel that varies most, in the pixels' own unit.

    Raises:
        Unreadable: too small, or flat.
    """
    if min(pixels.shape[:2]) < min_side:
        raise Unreadable("too_small", f"{pixels.shape[1]} x {pixels.shape[0]}")
    deviation = float(cv2.meanStdDev(pixels)[1].max())
    if deviation < min_std:
        raise Unreadable("flat", f"standard deviation {deviation:.2f}")


class _Picture(Opened):
    """A picture in memory; one open file serves all pages, since finding page n means n steps."""

    def __init__(self, data: bytes, options: ReadOptions) -> None:
        self._data, self._options = data, options
        self._format = check_format(data)
        self._image: Image.Image | None = None

    def decode(self, unit: int) -> Decoded:
        try:
            with _picture_faults():
                return self._decode(unit)
        except Unreadable:
            self.close()  # what an error leaves behind is not known
            raise

    def arrays(self) -> Iterator[Raw]:
        return readable(self, _describe(self._data).num_units)

    def close(self) -> None:
        if self._image is not None:
            self._image.close()
            self._image = None

    def _decode(self, page: int) -> Decoded:
        if self._image is None:
            self._image = Image.open(io.BytesIO(self._data), formats=(_PILLOW_NAMES[self._format],))
        image = self._image
        if self._format == "tiff":
            image.seek(page)
        if image.width * image.height > self._options.max_pixels:
            raise Unreadable("too_many_pixels", f"{image.width} x {image.height}")
        is_deep_color = _is_deep_color(self._data, image, self._format)
        image.load()
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        if is_deep_color:
            return Decoded(_orient(_decode_deep_color(self._data, self._format, page), orientation))
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith(("I", "F")):
            return Decoded(_deep_grey(upright, is_inverted=_is_white_zero(image, self._format)))
        if upright.has_transparency_data:
            return Decoded(_lay_on_black(upright))
        target = {"L": "L", "1": "L"}.get(upright.mode, "RGB")
        is_verbatim = upright.mode == target and orientation == 1 and page == 0
        plain = upright if upright.mode == target else upright.convert(target)
        return Decoded(np.ascontiguousarray(plain, dtype=np.uint8), is_verbatim)


@contextmanager
def _picture_faults() -> Iterator[None]:
    """As `decoder_faults`, with OpenCV, whose errors leave no trace of their own, and Pillow silent."""
    try:
        with quiet("PIL.TiffImagePlugin"), decoder_faults("PIL"):
            yield
    except cv2.error:
        raise Unreadable("damaged", "OpenCV") from None


def _describe(data: bytes) -> Header:
    name = check_format(data)
    with _picture_faults(), Image.open(io.BytesIO(data), formats=(_PILLOW_NAMES[name],)) as image:
        is_deep_color = _is_deep_color(data, image, name)
        is_grey = not is_deep_color and image.mode.startswith(("L", "1", "I", "F"))
        pages = int(getattr(image, "n_frames", 1)) if name == "tiff" else 1
        return Header(
            format=name,
            num_units=pages,
            height=image.height,
            width=image.width,
            is_deep=is_deep_color or image.mode.startswith(("I", "F")),
            channels=1 if is_grey else 3,
            is_volume=pages > 1,
        )


def _is_deep_color(data: bytes, image: Image.Image, format_name: str) -> bool:
    """Whether the file has several channels of more than 8 bits."""
    if format_name == "png":
        bit_depth, color_type = data[24], data[25]
        return bit_depth == 16 and color_type in (2, 4, 6)
    if format_name == "tiff":
        bits = image.tag_v2.get(_BITS_PER_SAMPLE_TAG)  # type: ignore[attr-defined]
        return isinstance(bits, tuple) and len(bits) > 1 and any(bit in (16, 32, 64) for bit in bits)
    return False


def _decode_deep_color(data: bytes, format_name: str, page: int) -> Raw:
    buffer = np.frombuffer(data, np.uint8)
    if format_name == "tiff":
        _, pages = cv2.imdecodemulti(buffer, cv2.IMREAD_UNCHANGED, range=(page, page + 1))
        array = pages[0] if pages else None
    else:
        array = cv2.imdecode(buffer, cv2.IMREAD_UNCHANGED)
    if array is None or array.ndim != 3 or array.shape[2] not in (3, 4):
        raise Unreadable("damaged", "of more than 8 bits a channel")
    if array.shape[2] == 3 and array.dtype == np.uint16:
        return np.asarray(array[:, :, ::-1])
    color: Raw = array[:, :, 2::-1].astype(np.float32)
    if array.shape[2] == 4:
        color *= array[:, :, 3:] / np.float32(np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1)
    return color


def _is_white_zero(image: Image.Image, format_name: str) -> bool:
    """Whether a TIFF's lowest value means white: Pillow inverts such pages of 8 bits, and no deeper ones."""
    tags = image.tag_v2 if format_name == "tiff" else {}  # type: ignore[attr-defined]
    return bool(tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO)


def _deep_grey(image: Image.Image, *, is_inverted: bool) -> Raw:
    """16 bits stay; Pillow gives signed 16 and all 32 bits as int32 or float, which become float32."""
    values = np.asarray(image)
    values = values.astype(np.uint16 if values.dtype.kind == "u" else np.float32)
    if not is_inverted:
        return values
    return np.asarray(~values if values.dtype == np.uint16 else -values)


def _orient(pixels: Raw, orientation: Any) -> Raw:
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
