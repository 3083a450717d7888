from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipeline.storage.files import write_text
from pipeline.storage.run_folder import RunFolder


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "critic', b"\x00" * 300, b"\xff\xfe\x80", b"[" * 10**5, b"7", b'{"a": 1}']
)
def test_what_a_power_cut_leaves_in_the_log_is_dropped(torn: bytes, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (1, 2, 3):
        run.append_metrics({"step": step})
    with run.metrics.open("ab") as file:
        file.write(torn)
    run.trim_metrics(2)
    run.append_metrics({"step": 3})
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3]


def test_what_a_killed_process_left_of_a_replacement_goes_with_the_next(tmp_path: Path) -> None:
    """And what a living one is writing stays."""
    path, host = tmp_path / "a.json", os.uname().nodename
    gone, living, other = (tmp_path / f".{name}.{host}.{pid}.tmp" for name, pid in
                           (("a.json", 2**22 + 1), ("a.json", 1), ("b.json", 2**22 + 1)))  # fmt: skip
    for each in (gone, living, other):
        each.write_text("half")
    write_text(path, "{}")
    assert sorted(tmp_path.iterdir()) == sorted([path, living, other])
