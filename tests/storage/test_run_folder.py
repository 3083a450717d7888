from __future__ import annotations

import json
from pathlib import Path

import pytest

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
