"""Files that are the old ones or the new ones, and errors that name them."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pipeline.distributed.launcher import run_program
from pipeline.errors import EXIT_FAILED
from pipeline.export.generator_file import save_export
from pipeline.export.images import save_each, save_grid
from pipeline.export.keras_files import save_keras
from pipeline.storage.files import write_text
from tests.export.generators import random_generator

PICTURES = torch.randint(256, (4, 1, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: write_text(path, "x" * 10**5),
    "grid": lambda path: save_grid(PICTURES, path, 2),
    "export": lambda path: save_export(random_generator(0, (1, 28, 28)), path, {}),
    "keras": lambda path: save_keras(random_generator(0, (1, 28, 28)), path),
}


@contextmanager
def little_room() -> Iterator[None]:
    """No file of this process grows beyond 2 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", WRITERS)
def test_what_finds_no_room_is_named_and_the_old_file_stays(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with little_room(), pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
        WRITERS[name](path)
    assert caught.value.filename == str(path)
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"file": "old"}


def test_pictures_that_find_no_room_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        with little_room():
            save_each(random_generator(0, (3, 64, 64)), 0, 2, tmp_path / "pictures")

    with pytest.raises(SystemExit) as ended:
        run_program(main)
    assert ended.value.code == EXIT_FAILED
    assert capsys.readouterr().err.endswith(f"error: {os.strerror(errno.EFBIG)}; nothing more was written\n")
