"""Numbers and settings as text, and the scores that are one number."""

import json
import re
from typing import NamedTuple

MISSING = "—"
FEW_IMAGES = 2_000


def finite(value: object) -> float | None:
    """Returns the number, or None for what is not one or could not be drawn, as NaN and infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None
    return float(value)


def number(value: object, digits: int = 3) -> str:
    """Returns a number with at least `digits` significant digits and commas between thousands."""
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
        return f"{seconds:.0f}\u00a0s"
    return f"{seconds / 60:.0f}\u00a0min" if seconds < 5400 else f"{seconds / 3600:.1f}\u00a0h"


def percent(share: object) -> str:
    known = finite(share)
    return MISSING if known is None else f"{known:.1%}"


def setting(value: object) -> str:
    """Returns a setting on one line, as YAML would hold it."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def counted(count: object, noun: str) -> str:
    """Returns a number with its noun, such as `1 mode` or `10 modes`."""
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"


def code(text: str) -> str:
    """Returns Markdown that shows any text as it is."""
    return "`" + re.sub(r"[`\s]+", " ", text) + "`"


def few_images(num_images: object, num_real: int = FEW_IMAGES) -> str | None:
    """Returns a warning if so few images were scored, or compared with, that the scores mean little."""
    count = finite(num_images)
    if count is not None and count < FEW_IMAGES:
        scored = f"{counted(count, 'image')} {'is' if count == 1 else 'are'} scored"
        return f"only {scored}: below {FEW_IMAGES:,} FID depends more on their number than on what they show"
    if num_real < FEW_IMAGES:
        real = counted(num_real, "real image")
        return f"only {real}: more would give lower FIDs, compare only FIDs against these same images"
    return None


class Score(NamedTuple):
    """A score that is one number."""

    title: str
    lower_is_better: bool | None = None
    """None: no checkpoint is chosen by it."""


SCORES = {
    "fid": Score("FID", lower_is_better=True),
    "fid_floor": Score("Floor"),
    "fid_published": Score("FID, published"),
    "fid_infinite": Score("FID, N → ∞", lower_is_better=True),
    "is_mean": Score("IS", lower_is_better=False),
    "kid_mean": Score("KID", lower_is_better=True),
    "precision": Score("Precision", lower_is_better=False),
    "recall": Score("Recall", lower_is_better=False),
    "density": Score("Density", lower_is_better=False),
    "coverage": Score("Coverage", lower_is_better=False),
    "sliced_wasserstein": Score("Sliced W2", lower_is_better=True),
    "authenticity": Score("Authentic"),
    "modes": Score("Modes", lower_is_better=False),
    "mode_kl": Score("KL of modes", lower_is_better=True),
}
"""The columns of a report's table of evaluations, by the names in files of scores. Checkpoints (`run.keep_best`) and
settings (`tune.py`) are chosen by those with a direction."""
LOGGED = (
    *("step", "critic_loss", "generator_loss", "critic_grad_norm", "generator_grad_norm", "clipped_fraction"),
    *("wasserstein_estimate", "images_per_second", "data_wait_seconds", "elapsed_seconds", "evaluation_seconds"),
)
"""The columns of the log; not every run has each."""
