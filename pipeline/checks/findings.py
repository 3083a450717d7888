"""What the doctor prints: findings of checks, made on the main rank or gathered from all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError


@dataclass(frozen=True)
class Finding:
    """A line of the doctor's."""

    level: Literal["ok", "warning", "error"]
    subject: str
    text: str
    """What was found; after a semicolon or colon what to do about it."""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.subject}: {self.text}"


class Caution(UserError):
    """Raised by a check for what the run will survive: a warning."""


Check = Callable[[], str | list[Finding]]
"""Returns what it found to be in order ("" says nothing); raises UserError or OSError for what is not."""


def against(subject: str, error: Exception) -> Finding:
    return Finding("warning" if isinstance(error, Caution) else "error", subject, str(error))


def findings_of(subject: str, check: Check) -> list[Finding]:
    try:
        found = check()
    except (UserError, OSError) as error:
        return [against(subject, error)]
    if isinstance(found, list):
        return found
    return [Finding("ok", subject, found)] if found else []


def findings_of_all(ranks: Ranks, subject: str, check: Check) -> list[Finding]:
    """What any rank has against it; if none has anything, what the first one says."""
    everyone = ranks.gather(findings_of(subject, check))
    found_on: dict[Finding, list[str]] = {}
    for rank, findings in enumerate(everyone):
        for finding in findings:
            found_on.setdefault(finding, []).append(str(rank))
    bad = [finding for finding in found_on if finding.level != "ok"]
    if ranks.world_size > 1:
        bad = [replace(finding, text=f"on rank {', '.join(found_on[finding])}: {finding.text}") for finding in bad]
    return bad or everyone[0]
