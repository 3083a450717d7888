"""The networks of .github/CONTRIBUTING.md, as the module that a run can name: `tests.guide:Generator`."""

from __future__ import annotations

from tests.ranks import ROOT

SECTION = (ROOT / ".github/CONTRIBUTING.md").read_text().split("## A network of one's own")[1]
EXAMPLE = SECTION.split("```python\n")[1].split("```")[0]
exec(compile(EXAMPLE, "CONTRIBUTING.md", "exec"))
