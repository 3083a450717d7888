"""One encoded image: its shape, and its pixels upright, opaque and in 8 bits, whatever Pillow's mode for them is."""

from __future__ import annotations

import struct
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from jsonargparse.typing import PositiveInt
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from pipeline.data.manifest import DataError
from pipeline.data.remarks import Remarks

DEEP_MODES = {"I;16", "I;16L", "I;16B", "I;16N"}
GREY_MODES = {"1", "L", "LA", "La"} | DEEP_MODES
COLOUR_MODES = {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
"""Pillow's other modes, I and F, hold 32-bit numbers whose range no file tells."""
SIDEWAYS = {5, 6, 7, 8}
"""EXIF orientations of images whose stored rows are columns."""
BROKEN_IMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, RuntimeError, struct.error),
    Image.DecompressionBombError,
)
"""What Pillow raises for content that is not an image, or not all of one: its later frames raise nearly anything."""


def add_options(parser: ArgumentParser) -> None:
    """Adds what a program's user may say of images in files."""
    number: dict[str, Any] = {"type": PositiveInt, "metavar": "N"}
    parser.add_argument("--crop", **number, help="cut the centre square of N x N out of images in files first")
    parser.add_argument("--size", **number, help="crop images in files to their centre square and resize it to N x N")
    limit = f"of an image in a file (default: {Image.MAX_IMAGE_PIXELS:,}); more than twice as many are refused"
    parser.add_argument("--max_pixels", **number, help=limit, default=Image.MAX_IMAGE_PIXELS)


def file_shape(file: Path | BinaryIO, name: str, remarks: Remarks, *, decode: bool = False) -> tuple[int, int, int]:
    """The shape of an encoded image as it is seen, of which only the header is read unless `decode`.

    Counts what `decode_image` leaves out: further frames, a colour profile other than sRGB, grey's lower 8 of 16 bits.
    Raises DataError.
    """
    try:
        with _opened(file) as image:
            if image.mode not in GREY_MODES | COLOUR_MODES and not _is_deep(image):
                raise DataError(f"{name} has pixels of mode {image.mode}: convert it to 8-bit grey or RGB")
            if _is_deep(image):
                remarks.add("read as 8 bits", "16-bit image", name)
            if frames := getattr(image, "n_frames", 1) - 1:
                remarks.add("left out", "further frame", name, frames)
            if profile := _foreign_profile(image.info.get("icc_profile")):
                remarks.add("left out", "colour profile", f"{profile} of {name}")
            if decode:
                image.load()
            height, width = _upright_size(image)
            return 3 if image.mode in COLOUR_MODES else 1, height, width
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{name}: {error} If you trust the file, give --max_pixels N (in Python: PIL.Image.MAX_IMAGE_PIXELS = N)"
        ) from None
    except UnidentifiedImageError:
        raise DataError(f"{name} is damaged or not an image: Pillow recognises no format in it") from None
    except BROKEN_IMAGE as error:
        raise DataError(f"{name} is damaged or not an image: {error}") from None


@contextmanager
def _opened(file: Path | BinaryIO) -> Iterator[Image.Image]:
    # Not by its name: Pillow then maps an uncompressed TIFF into memory, and one that lies on its side comes out mixed.
    with file.open("rb") if isinstance(file, Path) else nullcontext(file) as stream, Image.open(stream) as image:
        yield image


def _upright_size(image: Image.Image) -> tuple[int, int]:
    orientation = 1
    if image.width != image.height:  # of a PNG all is decoded to know, as it may come after the pixels
        with suppress(Exception):  # a damaged EXIF block raises nearly anything: there is no orientation then
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation not in SIDEWAYS:
        return image.height, image.width
    if image.format == "TIFF":  # which Pillow turns itself, since some version also in what it says before it loads
        image.load()
        return image.height, image.width
    return image.width, image.height


@lru_cache(maxsize=64)
def _foreign_profile(profile: bytes | None) -> str:
    """The name of a colour profile; "" for that of sRGB or none."""
    if not profile:
        return ""
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(BytesIO(profile))).strip()
    except (ImageCms.PyCMSError, OSError):
        name = ""
    return "" if "sRGB" in name else repr(name or "unknown")


def _is_deep(image: Image.Image) -> bool:
    # 16-bit grey; older versions of Pillow give such PNGs the mode of 32 bits, as all do with PGMs.
    return image.mode in DEEP_MODES or (image.mode == "I" and image.format in ("PNG", "PPM"))


def decode_image(
    image: Path | BinaryIO | npt.NDArray[np.uint8],
    image_shape: tuple[int, int, int],
    *,
    crop: int | None = None,
    resize: bool = False,
) -> npt.NDArray[np.uint8]:
    """uint8 [C, H, W], grey when C is 1 and RGB when C is 3, turned upright where its EXIF orientation says how.

    Of several frames it is the first. What is transparent lies on white; of 16 bits the upper eight count, as Pillow
    has it with RGB. Colour profiles are not applied, nor does torchvision or torch-fidelity: the numbers stored are
    what is read.

    Args:
        image: a file, or pixels uint8 [C, H, W].
        crop: side in pixels of the centre square that is cut out first; of odd remainders the larger half is left out
            at the right and at the bottom.
        resize: to the shape, after the centre is cropped to its proportions.

    Raises what BROKEN_IMAGE lists, and ValueError for another size without `resize`.
    """
    channels, height, width = image_shape
    if isinstance(image, np.ndarray):
        pixels = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
    else:
        with _opened(image) as file:
            file.load()
            with suppress(Exception):  # see _upright_size
                ImageOps.exif_transpose(file, in_place=True)
            pixels = _convert(file, "L" if channels == 1 else "RGB")
    if not resize and (crop or pixels.height, crop or pixels.width) != (height, width):
        raise ValueError(f"an image is {pixels.height} x {pixels.width}, not {height} x {width}")
    if crop is not None:
        left, top = (pixels.width - crop) // 2, (pixels.height - crop) // 2
        pixels = pixels.crop((left, top, left + crop, top + crop))
    if resize:
        pixels = ImageOps.fit(pixels, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(pixels).reshape(height, width, channels).transpose(2, 0, 1)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if _is_deep(image):
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert(mode)
    if image.mode == "La":  # which Pillow converts to nothing else
        image = image.convert("LA")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    if image.mode == "LAB":
        image = image.convert("RGB")
    return image.convert(mode)
