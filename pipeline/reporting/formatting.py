"""Numbers, durations, settings and scores in the words of a report."""

import json
import math
import re

from pipeline.reporting.read import Evaluation, Run, finite

MISSING = "—"
FEW_IMAGES = 2_000


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


def percent(share: object) -> str:
    known = finite(share)
    return MISSING if known is None else f"{known:.1%}"


def setting(value: object) -> str:
    """A setting on one line, as YAML would hold it."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def code(text: str) -> str:
    """Markdown that shows any text as it is."""
    return "`" + re.sub(r"[`\s]+", " ", text) + "`"


def few_images(num_images: object) -> str | None:
    """A warning where so few images were scored that the scores say little."""
    count = finite(num_images)
    if count is None or count >= FEW_IMAGES:
        return None
    return f"only {count:,.0f} images are scored: below {FEW_IMAGES:,} a FID tells more of their number than of them"


def counted(evaluation: Evaluation | None, features: str, metric: str = "fid") -> str:
    """How many images a score is of, for the caption of a figure."""
    match evaluation.images(features).get(metric) if evaluation else None:
        case [fake, real] if real:
            return f"N\u00a0=\u00a0{number(fake)} generated, {number(real)} real."
    return f"N\u00a0=\u00a0{number(evaluation.settings.get('num_images'))} generated." if evaluation else ""


def copies_in_words(evaluation: Evaluation, features: str) -> str:
    """How many generated images are no copies of training images, beside real ones that cannot be; empty if unknown."""
    share, control = (evaluation.score(features, key) for key in ("authenticity", "authenticity_real"))
    match evaluation.images(features):
        case {"authenticity": [scored, _], **others} if share is not None:
            words = f"In {features} features {percent(share)} of {number(scored)} generated images are further from "
            words += "the nearest training image than that is from its own nearest one"
            if control is not None:
                words += f", and {percent(control)} of {number(others.get('authenticity_real'))} other real images"
            return f"{words}: far fewer with a good FID would mean copies."
    return ""


def critic_in_words(evaluation: Evaluation | None) -> str:
    """The caption of how a critic scores images that it has seen and others."""
    critic = evaluation.about("critic") if evaluation else {}
    images, share = critic.get("images"), finite(critic.get("overfitting"))
    words = "How far above generated images the critic scores real ones, those it trains on and those it never sees."
    if share is not None:
        words += f" In the last evaluation {percent(share)} of the distance lies between seen and unseen images"
        words += f" (standard error {percent(critic.get('overfitting_error'))})."
    if isinstance(images, dict):
        kinds = {"train": "training", "test": "test", "generated": "generated"}
        counts = ", ".join(f"{number(images.get(kind))} {name}" for kind, name in kinds.items())
        words += f" N\u00a0=\u00a0{counts} images."
    return words


def in_brief(run: Run) -> list[str]:
    """Of each feature space the newest FID, its floor, and the best one where that is another."""
    lines = []
    for features in run.features:
        newest, best = run.newest(features), run.best.get(features)
        if newest is not None and best is not None:
            fid, floor = (number(newest.score(features, key)) for key in ("fid", "fid_floor"))
            other = "" if best["step"] == newest.step else f", best {number(best['fid'])} at step {best['step']:.0f}"
            lines.append(f"{features} FID {fid} (floor {floor}) at step {newest.step}{other}")
    return lines


def verdict(evaluation: Evaluation, features: str) -> str:
    """What the FID means beside its floor, in sentences. The words' bounds are a reading aid, not a test."""
    fid, floor = evaluation.score(features, "fid"), evaluation.score(features, "fid_floor")
    count, measured = (
        finite(evaluation.settings.get("num_images")),
        finite(evaluation.images(features).get("fid_floor")),
    )
    if fid is None:
        return "This evaluation measured no FID."
    if not floor:
        return "No floor was measured: the number only ranks runs that were scored in the same way."
    bounds = {1.5: "hardly any gap", 5: "a small gap", 25: "a clear gap", math.inf: "a wide gap"}
    gap = next(words for bound, words in bounds.items() if fid / floor <= bound)
    reference = str(evaluation.settings.get("reference"))
    other = {"train": "test", "test": "train"}.get(reference)
    real = f"real {other} images score against the same real {reference} images" if other else "other real images score"
    remark = ""
    if measured is None:
        remark = f" How many {other or 'real'} images gave the floor is not told: it falls with their number."
    elif count and measured < count:
        remark = f" There are no more of them: with {number(count)} the floor would be lower."
    return (
        f"That is {number(fid / floor, 2)} times the floor of {number(floor)}, which "
        f"{f'{number(measured)} ' if measured else ''}{real}: {gap} between generated and real images.{remark}"
    )
