"""Numbers, durations, settings and scores in the words of a report."""

import json
import math
import re

from pipeline.reporting.read import Evaluation, finite

MISSING = "—"


def number(value: object, digits: int = 3) -> str:
    """At least `digits` significant digits, thousands apart."""
    known = finite(value)
    if known is None:
        return MISSING
    if known.is_integer() or abs(known) >= 10 ** (digits - 1):
        return f"{known:,.0f}"
    return f"{known:#.{digits}g}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def percent(share: float | None) -> str:
    return MISSING if share is None else f"{share:.1%}"


def setting(value: object) -> str:
    """A setting on one line, as YAML would hold it."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def code(text: str) -> str:
    """Markdown that shows any text as it is."""
    return "`" + re.sub(r"[`\s]+", " ", text) + "`"


def verdict(evaluation: Evaluation, features: str) -> str:
    """What the FID means beside its floor, in a sentence. The words' bounds are a reading aid, not a test."""
    fid, floor = evaluation.score(features, "fid"), evaluation.score(features, "fid_floor")
    if fid is None:
        return "This evaluation measured no FID."
    if not floor:
        return "No floor was measured: the number only ranks runs that were scored in the same way."
    bounds = {1.5: "hardly any gap", 5: "a small gap", 25: "a clear gap", math.inf: "a wide gap"}
    gap = next(words for bound, words in bounds.items() if fid / floor <= bound)
    reference = str(evaluation.settings.get("reference"))
    other = {"train": "test", "test": "train"}.get(reference)
    real = f"real {other} images score against the same real {reference} images" if other else "other real images score"
    return (
        f"That is {number(fid / floor, 2)} times the floor of {number(floor)}, which {real}: "
        f"{gap} between generated and real images."
    )
