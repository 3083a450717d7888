"""Images in files: the shape and the pixels of one, whatever Pillow's mode for it is, and the one size that many have.

An image is read upright, opaque and in 8 bits. Of several frames it is the first; what is transparent lies on white; of
16 bits the upper eight count, as Pillow has it with RGB. Colour profiles are not applied, nor does torchvision or
torch-fidelity: the stored numbers are read.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from jsonargparse.typing import PositiveInt
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from pipeline.data.dataset import MAX_VALUES, DataError, Dataset, ImageShape, Remarks, naming

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


class Row(NamedTuple):
    """One image of a source."""

    name: str
    """What messages call it."""
    image: Pixels
    label: int | str | None = None
    """The number or the name of its class; None when unlabelled."""


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
    for name, text, default in (
        ("crop", "cut the centre square of N x N out of images in files first", None),
        ("size", "crop images in files to their centre square and resize it to N x N", None),
        ("max_pixels", "largest image in a file, in pixels", Image.MAX_IMAGE_PIXELS),
    ):
        parser.add_argument(f"--{name}", type=PositiveInt, metavar="N", help=text, default=default)


def seen_shape(image: Pixels, name: str, remarks: Remarks, *, decode: bool = False) -> ImageShape:
    """Returns the shape of an image as it is seen; of an encoded one only the header is read unless `decode`.

    Counts in `remarks` what `decode_image` leaves out: further frames, a colour profile other than sRGB, the lower 8 of
    16 bits. Raises DataError.
    """
    if isinstance(image, np.ndarray):
        channels, height, width = image.shape
        if channels not in (1, 3):
            raise DataError(f"{name} has {channels} channels: images have 1 (grey) or 3 (red, green, blue)")
        return channels, height, width
    with naming(f"{name} is damaged or not an image"):
        try:
            with _opened(image) as file:
                if file.mode not in GREY_MODES | COLOUR_MODES and not _is_deep(file):
                    raise DataError(f"{name} has pixels of mode {file.mode}: convert it to 8-bit grey or RGB")
                if _is_deep(file):
                    remarks.add("read as 8 bits", "16-bit image", name)
                if frames := getattr(file, "n_frames", 1) - 1:
                    remarks.add("left out", "further frame", name, frames)
                if profile := _foreign_profile(file.info.get("icc_profile")):
                    remarks.add("left out", "colour profile", f"{profile} of {name}")
                if decode:
                    file.load()
                return 3 if file.mode in COLOUR_MODES else 1, *_upright_size(file)
        except UnidentifiedImageError:
            raise ValueError("Pillow recognises no format in it") from None
        except Image.DecompressionBombError as error:
            advice = "If you trust the file, give --max_pixels N (in Python: PIL.Image.MAX_IMAGE_PIXELS = N)"
            raise DataError(f"{name}: {error} {advice}") from None


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

    Raises ValueError for another size than that of `image_shape` that is not resized, and for content that is no image,
    or not all of one, nearly anything, as Pillow does.
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


class CommonShape:
    """The one shape that many images are read as, known once all are added.

    Encoded ones become `channels`, by default RGB if any of them is: those of the other kind are counted in `remarks`.
    With `decode` each is decoded to see that it can be.
    """

    def __init__(
        self, remarks: Remarks, resizing: Resizing = AS_STORED, *, channels: int | None = None, decode: bool = False
    ) -> None:
        size = resizing.size
        if size is not None and not 4 <= size <= MAX_SIDE:
            raise DataError(f"--size is {size}: it must lie between 4 and {MAX_SIDE}")
        self._remarks, self._resizing, self._channels, self._decode = remarks, resizing, channels, decode
        self._shape: ImageShape | None = None
        self._kinds: dict[int, tuple[int, str]] = {}

    def add(self, row: Row) -> ImageShape:
        """Returns the shape that this image alone gets. Raises DataError naming it if it is not like those before it,
        or too small to be cropped."""
        name, crop = row.name, self._resizing.crop
        depth, *sides = stored = seen_shape(row.image, name, self._remarks, decode=self._decode)
        if crop is not None and min(sides) < crop:
            raise DataError(
                f"{name} is {sides[0]} x {sides[1]}, which --crop {crop} can't be cut out of: give a smaller one"
            )
        _, height, width = shape = self._resizing.shape_of(stored)
        before = self._shape or shape
        is_encoded = not isinstance(row.image, np.ndarray)
        if not is_encoded and depth != before[0]:
            raise DataError(f"{name} has images of {depth} channels, those before it have {before[0]}")
        if (height, width) != before[1:]:
            raise DataError(
                f"{name} is {height} x {width} (height x width), those before it are {before[1]} x {before[2]}: "
                "all images must have one size, and --size N makes it so"
            )
        self._shape = (is_encoded and self._channels) or max(depth, before[0]), height, width
        if math.prod(self._shape) > MAX_VALUES:
            raise DataError(
                f"images of {height} x {width} hold more than {MAX_VALUES:,} numbers, the most of a dataset's: "
                "give --size N"
            )
        count, first = self._kinds.get(depth, (0, name))
        self._kinds[depth] = count + 1, first
        return shape

    def of_all(self) -> ImageShape:
        """Returns the shape of all images that were added."""
        assert self._shape is not None
        if other := self._kinds.get({1: 3, 3: 1}.get(self._shape[0], 0)):
            is_grey = self._shape[0] == 1
            event, kind = ("read as grey", "colour image") if is_grey else ("read as RGB", "grey image")
            self._remarks.add(event, kind, other[1], other[0])
        return self._shape


def open_images(
    path: Path, dataset: Dataset, remarks: Remarks, *, crop: int | None = None, size: int | None = None
) -> Split:
    """Opens a folder of image files or an `.npz` file, to be compared with a dataset.

    A folder's images become grey for a grey dataset and RGB for another; its subfolders, if they have the names of the
    dataset's classes, and an `.npz` file's labels are the classes that the images should show. `crop` and `size` are
    those of Resizing. Raises DataError naming the file.
    """
    from pipeline.data.prepare.folder import list_images
    from pipeline.data.prepare.npz import load_npz, rows_of
    from pipeline.data.shards import numbered

    is_folder, resizing = path.is_dir(), Resizing(crop, size)
    rows = list_images(path, remarks) if is_folder else list(rows_of(path, *load_npz(path)[:2]))
    common = CommonShape(remarks, resizing, channels=dataset.image_shape[0])
    for row in rows:
        common.add(row)
    shape = common.of_all()
    if shape != dataset.image_shape:
        height, width = dataset.image_shape[1:]
        advice = f": give --size {width}" if shape[0] == dataset.image_shape[0] and height == width else ""
        raise DataError(
            f"{path} holds images of {' x '.join(map(str, shape))}, the dataset {dataset.name} has "
            f"{' x '.join(map(str, dataset.image_shape))}{advice}"
        )
    labels, numbers = [row.label for row in rows if row.label is not None], None
    if labels and dataset.num_classes:
        with suppress(ValueError) if is_folder else naming(str(path)):  # folders may be other things than classes
            numbers = numbered(labels, dataset.class_names)

    def read(indices: npt.NDArray[np.int64]) -> Images:
        return np.stack([decode_row(rows[index], shape, resizing) for index in indices])

    return Split(len(rows), numbers, read, [row.image for row in rows if isinstance(row.image, Path)] or [path])


def decode_row(row: Row, image_shape: ImageShape, resizing: Resizing) -> npt.NDArray[np.uint8]:
    """Returns what `decode_image` does, and raises DataError with the image's name for one that is damaged."""
    with naming(f"{row.name} is damaged"):
        return decode_image(row.image, image_shape, resizing)
