"""A made run for every test of reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reporting.made_runs import make_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "made")
