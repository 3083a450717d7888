"""Pictures as people have them: turned by a camera, of any mode, with profiles, frames, links and splits."""

from __future__ import annotations

import io
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, features

from pipeline.data import DataError, load_dataset
from pipeline.data.dataset import Remarks
from pipeline.data.images import Resizing, Split, decode_image, seen_shape
from pipeline.data.prepare import ShardSizes, index_shards, prepare_folder, prepare_npz
from pipeline.data.prepare.commit import write_shards
from pipeline.data.resident import load_split
from tests.data.test_prepare import Result, grey_folder, run

PLAIN = "106a81be78966d0c72bc80be52fb673e278663f1864668bd70f04aec4d30f179"
RESIZED = "9d4d5f0b5214052a55428b37501959c5d8ab66edec9ea2f57446a60875108081"
"""Fingerprints that ec1b328 gave to the datasets of plain pictures below."""
UPRIGHT = [[1, 2, 3], [4, 5, 6]]
STORED = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[3, 6], [2, 5], [1, 4]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[4, 1], [5, 2], [6, 3]],
}
"""By orientation, as EXIF 2.32 (section 4.6.4.A) says which side of the picture the stored row 0 and column 0 are: of
6, for instance, row 0 is the right side and column 0 the top."""


def turned(orientation: int) -> tuple[Image.Image, Image.Exif]:
    """STORED in blocks of 8 x 8 pixels, which JPEG keeps exactly, and the EXIF that tells of its orientation."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return Image.fromarray(np.kron(np.array(STORED[orientation]) * 40, np.ones((8, 8))).astype(np.uint8)), exif


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def exif_behind_the_pixels(content: bytes) -> bytes:
    """A PNG as some programs write it: its chunk eXIf is the last but one."""
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    return content[:start] + content[end:-12] + content[start:end] + content[-12:]


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    """In every format that says how, from files and from shards, whatever else their EXIF says or however broken it
    is."""
    folder = tmp_path / "in"
    folder.mkdir()
    for orientation in STORED:
        image, exif = turned(orientation)
        png = encoded(image, "PNG", exif=exif)
        contents = {
            "jpg": encoded(image, "JPEG", quality=100, exif=exif),
            "webp": encoded(image, "WEBP", lossless=True, exif=exif),
            "tif": encoded(image, "TIFF", exif=exif),
            "png": png,
            "late.png": exif_behind_the_pixels(png),
        }
        for suffix, content in contents.items():
            (folder / f"{orientation}.{suffix}").write_bytes(content)
    damaged = b"????" + turned(6)[1].tobytes().removeprefix(b"Exif\0\0")[4:]
    (folder / "broken.png").write_bytes(encoded(turned(1)[0], "PNG", exif=damaged))
    images = load_split(prepare_folder(tmp_path, "x", {"train": folder}), "train")[0]
    expected = np.kron(np.array(UPRIGHT) * 40, np.ones((8, 8)))
    assert images.shape == (8 * 5 + 1, 3, 16, 24), "WebP has no grey"
    assert np.array_equal(images.numpy(), np.broadcast_to(expected, images.shape))

    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        for orientation in STORED:
            archive.add(folder / f"{orientation}.jpg", f"{orientation}.jpg")
    images = load_split(index_shards(tmp_path, "shards", {"train": [str(tmp_path / "photos.tar")]}), "train")[0]
    assert np.array_equal(images.numpy(), np.broadcast_to(expected, (8, 1, 16, 24)))


def test_plain_pictures_give_the_dataset_that_they_gave_before(tmp_path: Path) -> None:
    """The fingerprint that ec1b328 gave this folder: nothing in it is turned, deep, profiled or animated."""
    numbers = (np.arange(8 * 6 * 4) * 37 % 256).astype(np.uint8).reshape(8, 6, 4)
    colour, grey = Image.fromarray(numbers[..., :3].copy()), Image.fromarray(numbers[..., 0].copy())
    palette = Image.frombytes("P", (6, 8), (numbers[..., 0] % 5).tobytes())
    palette.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200, 90, 90, 90])
    see_through = palette.copy()
    see_through.info["transparency"] = 2
    for split in ("train", "test"):
        folder = tmp_path / split / "b"
        folder.mkdir(parents=True)
        colour.save(folder / "rgb.png")
        colour.save(folder / "rgb.bmp")
        colour.convert("CMYK").save(folder / "cmyk.tif")
        colour.convert("YCbCr").save(folder / "ycbcr.tif")
        Image.fromarray(numbers).save(folder / "rgba.png")
        (tmp_path / split / "a").mkdir()
        grey.save(tmp_path / split / "a" / "l.pgm")
        grey.convert("1").save(tmp_path / split / "a" / "1.png")
        Image.fromarray(numbers[..., :2].copy()).save(tmp_path / split / "a" / "la.png")
        palette.save(tmp_path / split / "a" / "p.gif")
        see_through.save(tmp_path / split / "a" / "p.png")
    paths = {split: tmp_path / split for split in ("train", "test")}
    plain = prepare_folder(tmp_path, "plain", paths, ShardSizes(3, 7))
    assert plain.fingerprint == PLAIN
    assert prepare_folder(tmp_path, "cropped", paths, crop=5, size=4).fingerprint == RESIZED


REFUSED = None
FIFTH = (224, 204, 255)
"""(100, 0, 255) with an opacity of 51 / 255 on white: a fifth of it and four fifths of 255."""


def pictures_of_modes() -> dict[str, list[tuple[str, bytes, tuple[int, ...] | None]]]:
    """By Pillow's mode: files that it gives this mode, and what their one colour becomes, as grey or as RGB."""

    def file(mode: str, colour: Any, kind: str = "TIFF", **options: Any) -> bytes:
        return encoded(Image.new(mode, (4, 4), colour), kind, **options)

    palette = Image.new("P", (4, 4))
    palette.putpalette([1, 2, 3])
    lab = Image.merge("LAB", [Image.new("L", (4, 4), value) for value in (128, 128, 128)])
    associated = (b"\x52\x01\x03\x00\x01\x00\x00\x00\x02", b"\x52\x01\x03\x00\x01\x00\x00\x00\x01")
    """TIFF's tag ExtraSamples, 338, of one short integer: 2 is an alpha beside colours, 1 one that they are times."""
    deep = Image.new("I;16", (4, 4), 60_000)
    return {
        "1": [("PNG", file("1", 255, "PNG"), (255,))],
        "L": [("PNG", file("L", 100, "PNG"), (100,)), ("tRNS", file("L", 100, "PNG", transparency=100), (255,))],
        "LA": [("PNG", file("LA", (100, 51), "PNG"), (224,))],
        "La": [("TIFF", file("LA", (20, 51)).replace(*associated), (224,))],
        "P": [
            ("GIF", encoded(palette, "GIF"), (1, 2, 3)),
            ("transparent", encoded(palette, "GIF", transparency=0), (255, 255, 255)),
        ],
        "PA": [("TIFF", file("PA", (7, 0)), (255, 255, 255))],
        "RGB": [("PNG", file("RGB", (1, 2, 3), "PNG"), (1, 2, 3))],
        "RGBA": [
            ("PNG", file("RGBA", (100, 0, 255, 51), "PNG"), FIFTH),
            ("associated", file("RGBA", (20, 0, 51, 51)).replace(*associated), FIFTH),
        ],
        "CMYK": [("TIFF", file("CMYK", (55, 105, 155, 0)), (200, 150, 100))],
        "YCbCr": [("TIFF", file("YCbCr", (100, 128, 128)), (100, 100, 100))],
        # L* 50.2 of a grey: a luminance of 0.1858 and, by sRGB's curve, 0.4684 x 255.
        "LAB": [("TIFF", encoded(lab, "TIFF"), (119, 119, 119))],
        # 16 bits: 60,000 is 234 x 256 and 96.
        "I;16": [
            ("PNG", encoded(deep, "PNG"), (234,)),
            ("tRNS", encoded(deep, "PNG", transparency=60_000), (255,)),
            ("TIFF", encoded(deep, "TIFF"), (234,)),
        ],
        "I;16B": [("TIFF", file("I;16B", 60_000), (234,))],
        "I": [("PGM", b"P5 4 4 65535\n" + b"\xea\x60" * 16, (234,)), ("TIFF", file("I", 60_000), REFUSED)],
        "F": [("TIFF", file("F", 0.5), REFUSED)],
        # No format of those that are read gives these.
        **{mode: [] for mode in ("RGBa", "RGBX", "HSV", "I;16L", "I;16N")},
    }


def test_every_mode_of_pillow_is_read_as_written_down_here_or_refused() -> None:
    table = pictures_of_modes()
    assert set(Image.MODES) <= set(table), "a mode that Pillow has since: decide"
    for mode, files in table.items():
        for kind, content, expected in files:
            with Image.open(io.BytesIO(content)) as image:
                assert image.mode == mode, (mode, kind)
            if expected is None:
                with pytest.raises(DataError, match=rf"x has pixels of mode {mode}: convert it to 8-bit grey or RGB"):
                    seen_shape(io.BytesIO(content), "x", Remarks())
                continue
            assert seen_shape(io.BytesIO(content), "x", Remarks()) == (len(expected), 4, 4), (mode, kind)
            read = decode_image(io.BytesIO(content), (len(expected), 4, 4))
            assert np.abs(read.reshape(len(expected), -1).T - np.array(expected)).max() == 0, (mode, kind)
            red, green, blue = expected * (3 // len(expected))
            other = decode_image(io.BytesIO(content), (4 - len(expected), 4, 4)).astype(int)
            # ITU-R 601-2, which Pillow names for its conversion to grey.
            grey = 0.299 * red + 0.587 * green + 0.114 * blue
            assert np.abs(other - grey).max() <= 1, (mode, kind)


def test_colour_profiles_are_not_applied_and_said(tmp_path: Path) -> None:
    foreign = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    usual = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    (tmp_path / "in").mkdir()
    for name, profile in (("a", usual), ("b", foreign), ("c", b"no profile"), ("d", None)):
        Image.new("RGB", (4, 4), (200, 100, 50)).save(tmp_path / "in" / f"{name}.png", icc_profile=profile)
    result = prepared(tmp_path, "folder", tmp_path / "in")
    assert summary(result) == (
        f"{tmp_path}/x: 4 train images of 3 x 4 x 4 without classes; left out: 2 colour profiles "
        f"(first: 'XYZ identity built-in' of {tmp_path}/in/b.png)"
    )
    images = load_split(load_dataset(tmp_path / "x"), "train")[0]
    assert (images.numpy() == np.array([200, 100, 50]).reshape(1, 3, 1, 1)).all()


def prepared(root: Path, *arguments: object) -> Result:
    result = run(*arguments, "--name", "x", "--root", root)
    assert result.returncode == 0, result.stderr
    return result


def summary(result: Result) -> str:
    """The line of what was prepared, before that of a size which the generator does not reach."""
    return [line for line in result.stderr.splitlines() if not line.startswith("only networks")][-1]


def test_what_is_left_out_of_a_folder_is_counted_and_named(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "in", grey_folder(tmp_path / "elsewhere", {"dog": 2})
    grey_folder(root, {"cat": 3, "horse": 1})
    (root / "dog").symlink_to(elsewhere / "dog")
    (root / "cat" / "linked.png").symlink_to(elsewhere / "dog" / "000.png")
    for name in ("gone.png", "lost.png"):
        (root / "cat" / name).symlink_to(tmp_path / "nowhere")
    (root / "cat" / "again").symlink_to(root)
    (root / "zebra" / "deep").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "cat" / ".hidden.png").touch()
    (root / "notes.txt").touch()
    (root / "photo.heic").touch()
    os.mkfifo(root / "horse" / "pipe.png")
    frames = [Image.new("L", (6, 4), value) for value in (10, 20, 30)]
    for kind, count in (("gif", 3), ("png", 2), ("tif", 3)):
        frames[0].save(root / "horse" / f"frames.{kind}", save_all=True, append_images=frames[1:count])
    Image.fromarray(np.full((4, 6), 60_000, np.uint16)).save(root / "horse" / "sixteen.png")
    result = prepared(tmp_path, "folder", root)
    assert summary(result) == (
        f"{tmp_path}/x: 11 train images of 3 x 4 x 6 in 3 classes; "
        f"left out: 1 hidden folder (first: {root}/.hidden), 1 hidden file (first: {root}/cat/.hidden.png), "
        f"1 circular link (first: {root}/cat/again), 2 dangling links (first: {root}/cat/gone.png), "
        f"1 special file (first: {root}/horse/pipe.png), 2 unsupported files (first: {root}/notes.txt), "
        f"1 empty folder (first: {root}/zebra), 5 further frames (first: {root}/horse/frames.gif); "
        f"read as 8 bits: 1 16-bit image (first: {root}/horse/sixteen.png); "
        f"read as RGB: 10 grey images (first: {root}/cat/000.png)"
    )
    dataset = load_dataset(tmp_path / "x")
    assert dataset.class_names == ("cat", "dog", "horse")
    images, labels = load_split(dataset, "train")
    read = sorted((label, int(image[0, 0, 0])) for label, image in zip(labels.tolist(), images, strict=True))
    assert read == [
        *((0, value) for value in (30, 30, 31, 32)),
        *((1, value) for value in (30, 31)),
        *((2, value) for value in (10, 10, 10, 50, 234)),
    ]


def test_a_folder_of_nothing_but_dangling_links_says_so(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"in holds no image file .*left out: 1 dangling link \(first: .*in/a\.png\)"):
        prepare_folder(tmp_path, "x", {"train": tmp_path / "in"})


def test_rarer_suffixes_are_read_where_pillow_does(tmp_path: Path) -> None:
    kinds = {
        "jfif": "JPEG",
        "JPE": "JPEG",
        "jp2": "JPEG2000",
        "apng": "PNG",
        "pbm": "PPM",
        "pnm": "PPM",
        "webp": "WEBP",
    }
    if features.check("avif"):
        kinds["avif"] = "AVIF"
    for suffix, kind in kinds.items():
        (tmp_path / f"a.{suffix}").write_bytes(encoded(Image.new("1", (16, 16), 255).convert("L"), kind))
    result = prepared(tmp_path / "data", "folder", tmp_path)
    assert f"x: {len(kinds)} train images of 3 x 16 x 16 without classes; left out: 1 " not in result.stderr
    assert f"x: {len(kinds)} train images of 3 x 16 x 16" in result.stderr


def test_a_folder_of_train_and_test_is_two_splits(tmp_path: Path) -> None:
    for number, (test, further) in enumerate([("test", "val"), ("Val", "Labels"), ("validation", "extra")]):
        root = tmp_path / str(number)
        grey_folder(root / "train", {"cat": 3, "horse": 2})
        grey_folder(root / test, {"cat": 1, "horse": 1})
        grey_folder(root / further, {"cat": 1})
        (root / "README.txt").touch()
        (root / ".cache").touch()
        result = prepared(root, "folder", root)
        said, line, _ = result.stderr.splitlines()
        assert said == f"{root} holds train/ and {test}/: they are read as the splits train and test, not as classes"
        assert re.sub("left out: .*", "", line) == f"{root}/x: 5 train, 2 test images of 1 x 4 x 6 in 2 classes; "
        for item in (
            f"1 hidden file (first: {root}/.cache)",
            f"1 further file (first: {root}/README.txt)",
            f"1 further folder (first: {root}/{further})",
        ):
            assert item in line
        dataset = load_dataset(root / "x")
        assert dataset.class_names == ("cat", "horse")
        assert sorted(load_split(dataset, "test")[1].tolist()) == [0, 1]
    # Who says where the test images are has two folders of classes; train/ alone, or test/ alone, is a class.
    root = tmp_path / "0"
    with pytest.raises(
        DataError, match=r"has no images of the classes \['cat', 'horse'\]: every split must have all classes"
    ):
        prepare_folder(tmp_path, "y", {"train": root, "test": root / "test"})
    grey_folder(tmp_path / "test only", {"test": 1, "cat": 1})
    assert prepare_folder(tmp_path, "z", {"train": tmp_path / "test only"}).class_names == ("cat", "test")


def test_too_many_pixels_are_refused_with_the_setting_that_allows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 24 pixels where 10 are the limit, and above 20 Pillow refuses."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    grey_folder(tmp_path / "in", {"": 2})
    result = run("folder", tmp_path / "in", "--name", "x", "--root", tmp_path)
    (line,) = result.stderr.splitlines()
    assert (result.returncode, line) == (
        2,
        f"error: {tmp_path}/in/000.png: Image size (24 pixels) exceeds limit of 20 pixels, could be decompression bomb "
        "DOS attack. If you trust the file, give --max_pixels N (in Python: PIL.Image.MAX_IMAGE_PIXELS = N)",
    )
    assert prepared(tmp_path, "folder", tmp_path / "in", "--max_pixels", 24).returncode == 0


def test_images_that_no_dataset_may_hold_are_refused_before_they_are_read(tmp_path: Path) -> None:
    """2^26 numbers are the most: 8,192 x 8,193 pixels are more."""
    (tmp_path / "a.pgm").write_bytes(b"P5 8192 8193 255\n")
    with pytest.raises(DataError, match=r"images of 8193 x 8192 hold more than 67,108,864 numbers.*: give --size N"):
        prepare_folder(tmp_path, "x", {"train": tmp_path})


def test_shards_and_arrays_are_cropped_and_resized_as_a_folder_is(tmp_path: Path) -> None:
    """Numbered pixels: 5 x 7 and 4 x 4 as PNGs in one shard, 6 x 6 as blocks in another."""
    pictures = [np.arange(35, dtype=np.uint8).reshape(5, 7), np.arange(16, dtype=np.uint8).reshape(4, 4) + 100]
    blocks = np.arange(72, dtype=np.uint8).reshape(2, 1, 6, 6) + 150
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number, picture in enumerate(pictures):
            for suffix, content in (("png", encoded(Image.fromarray(picture), "PNG")), ("cls", b"%d" % number)):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    write_shards(tmp_path, {"1": Split(2, np.array([1, 0]), blocks.__getitem__)}, ShardSizes(1, 9), shuffle=False)
    patterns = (tmp_path / "0.tar", tmp_path / "1-00000.tar")
    plain = run("shards", *patterns, "--name", "x", "--root", tmp_path)
    assert (
        "4 x 4 (height x width), those before it are 5 x 7: all images must have one size, and --size N makes it so"
        in plain.stderr
    )
    sizes = ("--images_per_shard", 3, "--images_per_block", 2)
    prepared(tmp_path, "shards", *patterns, "--test", patterns[1], "--crop", 2, *sizes)
    dataset = load_dataset(tmp_path / "x")
    # The square of 2 begins in row and column (5 - 2) // 2 and (7 - 2) // 2; 1 and 1; 2 and 2.
    expected = [[9, 10, 16, 17], [105, 106, 109, 110], [164, 165, 170, 171], [200, 201, 206, 207]]
    images, labels = load_split(dataset, "train")
    assert images.flatten(1).tolist() == expected
    assert labels.tolist() == [0, 1, 1, 0]
    assert load_split(dataset, "test")[0].flatten(1).tolist() == expected[2:]
    assert [shard.num_images for shard in dataset.shards("train")] == [3, 1]
    with tarfile.open(tmp_path / "x" / "train-00000.tar") as archive:
        names = [member.name for member in archive if member.name.endswith("images.npy")]
    assert names == ["00000000.images.npy", "00000002.images.npy"]
    # A folder of the same pictures gives the same pixels, by the same filter.
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, picture in enumerate([*pictures, *blocks[:, 0]]):
        Image.fromarray(picture).save(folder / f"{number}.png")
    from_folder = load_split(prepare_folder(tmp_path, "a", {"train": folder}, size=4), "train")[0]
    from_shards = load_split(
        index_shards(tmp_path, "b", {"train": list(map(str, patterns))}, resizing=Resizing(size=4)), "train"
    )[0]
    assert sorted(from_folder.flatten(1).tolist()) == sorted(from_shards.flatten(1).tolist())
    np.savez(tmp_path / "c.npz", images=blocks)
    from_array = load_split(prepare_npz(tmp_path, "c", {"train": tmp_path / "c.npz"}, size=4), "train")[0]
    assert sorted(from_array.flatten(1).tolist()) == sorted(from_shards[2:].flatten(1).tolist())
    with pytest.raises(DataError, match=r"0\.tar is 5 x 7, which --crop 6 can't be cut out of"):
        index_shards(tmp_path, "d", {"train": [str(patterns[0])]}, resizing=Resizing(crop=6))


def test_grey_and_colour_in_shards_are_said_as_in_a_folder(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number, mode in enumerate(("L", "RGB", "L")):
            content = encoded(Image.new(mode, (4, 4)), "PNG")
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    result = prepared(tmp_path, "shards", tmp_path / "0.tar")
    assert f"; read as RGB: 2 grey images (first: an image of {tmp_path}/0.tar)\n" in result.stderr
