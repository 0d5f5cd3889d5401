"""Scores in words: what each is called, how its number is written, and the table of a run with its protocols."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape

from eval.names import INCEPTION, answers_to, better, parts_of
from eval.protocol import Record, features_of
from tokenloom.page import facts, flattened, table

SUBJECTS = ("real", "tokenizer", "enlarged", "autoregressive", "diffusion", "autoregressive_random", "pixels")
TITLES = {
    "real": "Real images against other real ones",
    "tokenizer": "Tokenizer",
    "enlarged": "Smaller images, enlarged",
    "autoregressive": "Autoregressive transformer",
    "diffusion": "Latent diffusion",
    "autoregressive_random": "Autoregressive transformer, untrained",
    "pixels": "Raw pixels",
}
PERCENT = "%"
UP, DOWN = "\N{UPWARDS ARROW}", "\N{DOWNWARDS ARROW}"


@dataclass(frozen=True)
class Kind:
    """How scores of one name are shown; `decimals` None means three significant digits."""

    label: str
    meaning: str
    unit: str = ""
    decimals: int | None = None
    better: str = ""
    """The arrow of eval.names.better."""


KINDS = {
    "psnr": Kind("PSNR", "peak signal-to-noise ratio against the original", "dB", 2),
    "ssim": Kind("SSIM", "structural similarity to the original", "", 3),
    "lpips": Kind("LPIPS", "perceptual distance from the original", "", 3),
    "usage": Kind("Codebook usage", "codes that occur at all", PERCENT, 1),
    "usage_256": Kind("Codebook usage in 256 images", "mean over batches of 256", PERCENT, 1),
    "perplexity": Kind("Code perplexity", "as many equally frequent codes say as much", "", 1),
    "rfd": Kind("Reconstruction Fréchet distance", "reconstructions against their originals"),
    "rfid": Kind("rFID", "reconstructions against their originals"),
    "fd": Kind("Fréchet distance", "to real training images"),
    "fid": Kind("FID", "Fréchet distance to real training images"),
    "fd_inf": Kind("Fréchet distance at infinity", "extrapolated to infinitely many samples"),
    "fid_inf": Kind("FID\N{INFINITY}", "FID extrapolated to infinitely many samples"),
    "is": Kind("Inception Score", "sure of each image, varied over all", "", 2),
    "is_": Kind("Confidence and variety", "Inception Score's formula", "", 2),
    "kid": Kind("Kernel distance", "squared MMD to real training images"),
    "precision": Kind("Precision", "share that looks like real images", PERCENT, 1),
    "recall": Kind("Recall", "share of real images that is covered", PERCENT, 1),
    "density": Kind("Density", "how densely real images lie around samples; like real ones: 1", "", 3),
    "coverage": Kind("Coverage", "share of real images with a sample near by", PERCENT, 1),
    "copies": Kind("Copies", "share nearer to a training image than 99 % of held-out real ones", PERCENT, 1),
    "class_accuracy": Kind("Class accuracy", "samples taken for the class that was asked", PERCENT, 1),
    "probe_top1": Kind("Linear probe", "top-1 on test images", PERCENT, 1),
    "probe_top5": Kind("Linear probe, top-5", "right class among the first five, test images", PERCENT, 1),
    "knn_top1": Kind("k-NN", "top-1 on test images, by the nearest training images", PERCENT, 1),
    "nll": Kind("Negative log likelihood", "of test images, in nats per code", "", 3),
}
ARROWS = {"higher": UP, "lower": DOWN, "": ""}


def kind_of(name: str) -> Kind:
    """How a score is shown: that of its name without features; the label tells a small number of images, as FID-5k."""
    kind, count = KINDS.get(_kind_key(name)), parts_of(name).images
    label = (kind.label if kind else name) + (f"-{count}" if count else "")
    return replace(kind or Kind(label, ""), label=label, better=ARROWS[better(name)])


def _kind_key(name: str) -> str:
    """Key of KINDS; Inception Score's formula on other features is no Inception Score."""
    score, _, features = parts_of(name)
    return f"{score}_" if score == "is" and features not in INCEPTION.values() else score


def written(name: str, value: float, *, like: float | None = None) -> str:
    """A score's number without its unit; `like` is the value whose decimals an interval's bound takes over."""
    kind = kind_of(name)
    if not math.isfinite(value):
        return "not finite"
    if kind.unit == PERCENT:
        value = 100 * value
    decimals = significant_decimals(value if like is None else like) if kind.decimals is None else kind.decimals
    text = f"{value:.2e}" if decimals > 6 else f"{value:,.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def significant_decimals(value: float, digits: int = 3) -> int:
    """Decimals that show so many significant digits."""
    return digits - 1 if value == 0 else max(0, digits - 1 - math.floor(math.log10(abs(value))))


def find(records: Iterable[Record], subject: str, *names: str) -> Record | None:
    """The first score of a subject under one of the names, be it with a number of images: `fid` finds `fid5k`.

    If there is none, with any features behind it: `fd` finds `fd_random`.
    """
    mine = [record for record in records if record["subject"] == subject]
    fits = [(answers_to(record["name"], name), record) for name in names for record in mine]
    return next((record for least in (2, 1) for fit, record in fits if fit >= least), None)


def score_tables(records: Sequence[Record]) -> str:
    """A block for each subject: its table, and what it was measured under."""
    blocks = []
    for subject in sorted(dict.fromkeys(record["subject"] for record in records), key=_subject_rank):
        mine = sorted((record for record in records if record["subject"] == subject), key=_rank)
        rows = table(("score", "value, 95 % interval", "images"), map(_row, mine))
        blocks.append(f"<div><h3>{escape(subject_title(subject))}</h3>{rows}{_protocols(mine)}</div>")
    return f'<div class="columns">{"".join(blocks)}</div>'


def subject_title(subject: str) -> str:
    """What a subject is called; of other samples of a family it says which: of rejection sampling, how many it kept."""
    family, share = accepted_share(subject)
    if share is not None:
        return f"{TITLES.get(family, family)}, best {100 * share:g}\N{NO-BREAK SPACE}% of its candidates"
    family, _, name = subject.partition("@")
    if not name or family not in TITLES:
        return TITLES.get(subject, subject)
    step = snapshot_step(subject)
    return TITLES[family] + (f", {name}" if step is None else f" after {step:,} steps")


def snapshot_step(subject: str) -> int | None:
    """The training step of the snapshot that a subject is of, if it is of one."""
    found = re.fullmatch(r"\w+@step(\d+)", subject)
    return int(found[1]) if found else None


def accepted_share(subject: str) -> tuple[str, float | None]:
    """The family of a subject, and the share of its candidates that rejection sampling kept, if it did."""
    found = re.fullmatch(r"(\w+)@accept(0\.\d+)", subject)
    return (found[1], float(found[2])) if found else (subject, None)


def _subject_rank(subject: str) -> tuple[int, int, float]:
    """Place of a subject: its family's, unknown ones last. Behind the family itself the best of its candidates, the
    fewer the further; then variants as they come, then snapshots by their steps.
    """
    family, _, name = subject.partition("@")
    share, step = accepted_share(subject)[1], snapshot_step(subject)
    kind = 0 if not name else 1 if share is not None else 2 if step is None else 3
    return SUBJECTS.index(family) if family in SUBJECTS else len(SUBJECTS), kind, step or -(share or 0)


def _rank(record: Record) -> int:
    """Place of a score in the table: that of its kind, unknown ones last."""
    keys = list(KINDS)
    key = _kind_key(record["name"])
    return keys.index(key) if key in keys else len(keys)


def _row(record: Record) -> tuple[str, ...]:
    name, value, interval = record["name"], record["value"], record.get("interval")
    kind = kind_of(name)
    label, meaning = f"{kind.label}\N{NO-BREAK SPACE}{kind.better}".strip(), _meaning(record, kind)
    bounds = " to ".join(written(name, bound, like=value) for bound in interval) if interval else ""
    unit = f"\N{NO-BREAK SPACE}{kind.unit}" if kind.unit else ""
    head = f"{escape(label)}<small>{escape(meaning)}</small>"
    return head, f"<b>{escape(written(name, value) + unit)}</b><small>{bounds}</small>", f"{record.get('n') or 0:,}"


def _meaning(record: Record, kind: Kind) -> str:
    features, tap = features_of(record), record.get("tap")
    if record["name"].startswith("lpips_"):
        features = record["name"].removeprefix("lpips_")
    judged = f"{features} features" if features and record["name"] != "class_accuracy" else ""
    return ", ".join(part for part in (kind.meaning, judged, f"tap {tap}" if tap else "") if part)


def _protocols(records: Sequence[Record]) -> str:
    """What all scores of a subject share, then what is particular to some; scores alike in all are told together."""
    listed = [(kind_label(record), flattened(record["protocol"])) for record in records]
    shared = [fact for fact in listed[0][1] if all(fact in told for _, told in listed)]
    own: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for label, told in listed:
        own.setdefault(tuple(fact for fact in told if fact not in shared), []).append(label)
    parts = [facts(shared)]
    parts += [f"<h4>{escape(', '.join(labels))}</h4>{facts(told)}" for told, labels in own.items() if told]
    return f"<details><summary>How this was measured</summary>{''.join(parts)}</details>"


def kind_label(record: Record) -> str:
    """Label of a score with its features, where several share the label."""
    features = features_of(record)
    return f"{kind_of(record['name']).label} ({features})" if features else kind_of(record["name"]).label


def share_text(value: float) -> str:
    """A share in per cent with one decimal."""
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"
