"""Images in files: the shape and the pixels of one, whatever Pillow's mode for it is, and the one size that many have.

An image is read upright, opaque and in 8 bits. Of several frames it is the first; what is transparent lies on white; of
16 bits the upper eight count, as Pillow has it with RGB. Colour profiles are not applied, nor does torchvision or
torch-fidelity: the stored numbers are read.
"""

from __future__ import annotations

import math
import struct
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from jsonargparse.typing import PositiveInt
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from pipeline.data.class_names import labels_of
from pipeline.data.dataset import MAX_VALUES, DataError, Dataset, ImageShape, Remarks

if TYPE_CHECKING:
    from pipeline.data.shards import Images, Labels

MAX_SIDE = 4096
"""The largest side that images are resized to."""
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

Pixels = Path | BinaryIO | Image.Image | npt.NDArray[np.uint8]
"""One image: a file, an image of Pillow's, or uint8 [C, H, W]."""


class Resizing(NamedTuple):
    """How images in files are brought to one size: by `crop` alone, by `size` alone, by the one and then the other."""

    crop: int | None = None
    """Side in pixels of the centre square that is cut out; the larger half of an odd rest is left out at the right and
    at the bottom."""
    size: int | None = None
    """Side in pixels that what is there is resized to, after it is cropped to its centre square."""

    def shape_of(self, image_shape: ImageShape) -> ImageShape:
        """Returns the shape that an image of this shape gets."""
        side = self.size or self.crop
        return (image_shape[0], side, side) if side else image_shape


AS_STORED = Resizing()


class Split(NamedTuple):
    """Images that can be read a few at a time."""

    num_images: int
    labels: Labels | None
    """int64 [num_images]."""
    read: Callable[[npt.NDArray[np.int64]], Images]
    """Indices [n] -> uint8 [n, C, H, W]."""
    files: Sequence[Path] = ()
    """The files that are read, where that is known."""


def add_options(parser: ArgumentParser) -> None:
    """Adds the options --crop, --size and --max_pixels of images in files."""

    def add(name: str, text: str, default: int | None = None) -> None:
        parser.add_argument(name, type=PositiveInt, metavar="N", help=text, default=default)

    add("--crop", "cut the centre square of N x N out of images in files first")
    add("--size", "crop images in files to their centre square and resize it to N x N")
    limit = Image.MAX_IMAGE_PIXELS
    add("--max_pixels", "largest image in a file, in pixels", limit)


def file_shape(file: Path | BinaryIO | Image.Image, name: str, remarks: Remarks, *, decode: bool = False) -> ImageShape:
    """Returns the shape of an encoded image as it is seen, of which only the header is read unless `decode`.

    Counts in `remarks` what `decode_image` leaves out: further frames, a colour profile other than sRGB, the lower 8 of
    16 bits. Raises DataError.
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
def _opened(file: Path | BinaryIO | Image.Image) -> Iterator[Image.Image]:
    if isinstance(file, Image.Image):  # a copy, which may be turned
        image = file.copy()
        image.format = file.format
        yield image
        return
    # Not by its name: Pillow then maps an uncompressed TIFF into memory, and one that lies on its side comes out mixed.
    with file.open("rb") if isinstance(file, Path) else nullcontext(file) as stream, Image.open(stream) as image:
        yield image


def _upright_size(image: Image.Image) -> tuple[int, int]:
    orientation = 1
    if image.width != image.height:  # else a PNG would be decoded to know, as its EXIF may follow the pixels
        with suppress(Exception):  # a damaged EXIF block raises nearly anything: there is no orientation then
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation in SIDEWAYS and image.format != "TIFF":
        return image.width, image.height
    if orientation in SIDEWAYS:  # Pillow turns a TIFF itself, and in some versions only its size before it is loaded
        image.load()
    return image.height, image.width


@lru_cache(maxsize=64)
def _foreign_profile(profile: bytes | None) -> str:
    """Returns the name of a colour profile; "" for that of sRGB or none."""
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


def decode_image(image: Pixels, image_shape: ImageShape, resizing: Resizing = AS_STORED) -> npt.NDArray[np.uint8]:
    """Returns uint8 [C, H, W], grey when C is 1 and RGB when C is 3.

    Raises what BROKEN_IMAGE lists, and ValueError for another size than that of `image_shape` that is not resized.
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
    crop = resizing.crop
    if not resizing.size and (crop or pixels.height, crop or pixels.width) != (height, width):
        raise ValueError(f"an image is {pixels.height} x {pixels.width}, not {height} x {width}")
    if crop:
        left, top = (pixels.width - crop) // 2, (pixels.height - crop) // 2
        pixels = pixels.crop((left, top, left + crop, top + crop))
    if resizing.size:
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


def common_shape(
    shapes: Iterable[tuple[str, ImageShape, bool]],
    remarks: Remarks,
    resizing: Resizing = AS_STORED,
    *,
    channels: int | None = None,
) -> ImageShape:
    """Returns the one shape that images are read as, each given by its name, shape and whether it is encoded.

    Encoded ones become `channels`, by default RGB if any of them is: those of the other kind are counted. Raises
    DataError naming the first that is not like those before it, or too small to be cropped.
    """
    crop, size = resizing
    if size is not None and not 4 <= size <= MAX_SIDE:
        raise DataError(f"--size is {size}: it must lie between 4 and {MAX_SIDE}")
    common: ImageShape | None = None
    kinds: dict[int, tuple[int, str]] = {}
    for name, image_shape, encoded in shapes:
        depth, *sides = image_shape
        if crop is not None and min(sides) < crop:
            raise DataError(
                f"{name} is {sides[0]} x {sides[1]}, which --crop {crop} can't be cut out of: give a smaller one"
            )
        _, height, width = resizing.shape_of(image_shape)
        before = common or (depth, height, width)
        if not encoded and depth != before[0]:
            raise DataError(f"{name} has images of {depth} channels, those before it have {before[0]}")
        if (height, width) != before[1:]:
            raise DataError(
                f"{name} is {height} x {width}, those before it are {before[1]} x {before[2]}: "
                "all images must have one size, and --size N makes it so"
            )
        common = (channels or max(depth, before[0]), height, width)
        if math.prod(common) > MAX_VALUES:
            raise DataError(
                f"images of {height} x {width} hold more than {MAX_VALUES:,} numbers, the most of a dataset's: "
                "give --size N"
            )
        count, first = kinds.get(depth, (0, name))
        kinds[depth] = count + 1, first
    assert common is not None
    if other := kinds.get({1: 3, 3: 1}.get(common[0], 0)):
        event, kind = ("read as grey", "colour image") if common[0] == 1 else ("read as RGB", "grey image")
        remarks.add(event, kind, other[1], other[0])
    return common


def open_images(
    path: Path, dataset: Dataset, remarks: Remarks, *, crop: int | None = None, size: int | None = None
) -> Split:
    """Opens a folder of image files or an `.npz` file, to be compared with a dataset.

    A folder's images become grey for a grey dataset and RGB for another; its subfolders, if they have the names of the
    dataset's classes, and an `.npz` file's labels are the classes that the images should show. `crop` and `size` are
    those of Resizing. Raises DataError naming the file.
    """
    from pipeline.data.prepare.folder import list_images
    from pipeline.data.prepare.npz import load_npz

    resizing, is_folder = Resizing(crop, size), path.is_dir()
    images: Sequence[Pixels]
    if is_folder:
        files, folders = list_images(path, remarks)
        names, images, labels = list(map(str, files)), files, labels_of(folders, dataset.class_names)
        shapes = ((str(file), file_shape(file, str(file), remarks), True) for file in files)
        shape = common_shape(shapes, remarks, resizing, channels=dataset.image_shape[0])
    else:
        array, labels, _ = load_npz(path)
        files, names, images = [path], [f"image {index} of {path}" for index in range(len(array))], list(array)
        shape = common_shape([(str(path), array.shape[1:], False)], remarks, resizing)
        if not dataset.num_classes:
            labels = None
        if labels is not None and not 0 <= labels.min() <= labels.max() < dataset.num_classes:
            raise DataError(
                f"{path}: labels reach from {labels.min()} to {labels.max()}, not 0 to {dataset.num_classes - 1}"
            )
    if shape != dataset.image_shape:
        height, width = dataset.image_shape[1:]
        advice = f": give --size {width}" if shape[0] == dataset.image_shape[0] and height == width else ""
        raise DataError(
            f"{path} holds images of {' x '.join(map(str, shape))}, the dataset {dataset.name} has "
            f"{' x '.join(map(str, dataset.image_shape))}{advice}"
        )

    def read(indices: npt.NDArray[np.int64]) -> Images:
        return np.stack([decode_named(names[index], images[index], shape, resizing) for index in indices])

    return Split(len(images), labels, read, files)


def decode_named(name: str, image: Pixels, image_shape: ImageShape, resizing: Resizing) -> npt.NDArray[np.uint8]:
    """Returns what `decode_image` does, and raises DataError with the image's name for one that is damaged."""
    try:
        return decode_image(image, image_shape, resizing)
    except BROKEN_IMAGE as error:
        raise DataError(f"{name} is damaged: {error}") from None
