"""One self-contained page that tells a run: what it is, what it made, how it learned, how it scored."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from safetensors import SafetensorError, safe_open

from engine.checkpoint import write_atomic
from eval.protocol import Record, code_version, features_of
from tokenloom import curves, gallery, page
from tokenloom.curriculum_curves import of_curriculum
from tokenloom.probe_curves import probe_curves
from tokenloom.run_files import FAMILIES, STAGES, RunFiles
from tokenloom.score_table import TITLES, find, kind_of, score_tables, share_text, written

CHAPTERS = {
    "samples": "Samples",
    "neighbours": "Nearest training images",
    "reconstructions": "Reconstructions",
    "training": "Training",
    "codes": "Use of the codes",
    "probe": "Linear probe",
    "scores": "Scores",
    "time": "Time and models",
    "configuration": "Configuration",
}
INTROS = {
    "codes": "A tokenizer that leaves codes unused wastes its vocabulary. Perplexity is the number of equally frequent "
    "codes that would carry as much information.",
    "probe": "How well a linear classifier tells the classes apart from frozen activations, and how well the nearest "
    "training images do (k-NN). The tap in the ring was chosen on held-out training images; bars are 95 % intervals. "
    "Untrained: the same network with fresh weights.",
    "scores": "Arrows say which way is better. `tokenloom compare` holds runs against each other and refuses unlike "
    "protocols.",
}
CLUSTERS = (
    "Clusters are parts of the noise levels, 1 the least noisy. A shaded column covers the steps since the one before;"
    " the loss of a cluster is shaded against the first that was logged of it."
)
BASELINES = {"pixels": "raw pixels", "autoregressive_random": "untrained"}  # of the probe, and what a figure calls them
CLASSIFIERS = {
    "classifier": "behind features and class accuracy",
    "rejection_classifier": "that picks the best candidates, and judges nothing,",
}
ALIKE = "Both learned from the same images, so they err alike; distances on random features depend on neither."
Card = tuple[str, str, str, str]  # label, number, unit, aside


def write_report(run_folder: Path) -> Path:
    """Write `run_folder/report.html` from what the folder holds, and return its path.

    The page needs no network and no other file. What is not there yet is said in words.

    Raises:
        ValueError: there is no such folder.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run folder (working folder: {Path.cwd()}); `tokenloom run` makes one")
    run = RunFiles(folder)
    content = {
        "samples": gallery.samples(run),
        "neighbours": gallery.neighbours(run),
        "reconstructions": gallery.reconstructions(run),
        "training": "".join(_training(run, stage) for stage in STAGES),
        "codes": curves.code_usage(run),
        "probe": probe_curves(run),
        "scores": _scores(run),
        "time": _time(run),
        "configuration": _configuration(run),
    }
    sections = [page.section(name, CHAPTERS[name], html, intro=INTROS.get(name, "")) for name, html in content.items()]
    footer = f"tokenloom {escape(code_version())} \N{MIDDLE DOT} {time.strftime('%Y-%m-%d %H:%M')}"
    html = page.document(title=f"{run.name}: tokenloom report", header=_header(run), sections=sections, footer=footer)
    write_atomic(folder / "report.html", html.encode())
    return folder / "report.html"


def _header(run: RunFiles) -> str:
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title in CHAPTERS.items())
    cards = headline(run.scores())
    shown = page.figures(cards) if cards else page.note("No scores yet: `tokenloom eval` measures them.")
    opening = f'<p class="brand">tokenloom report</p><h1>{escape(run.name)}</h1>'
    return f'{opening}<p class="lead">{escape(summary(run))}</p>{shown}<nav aria-label="Chapters">{links}</nav>'


def summary(run: RunFiles) -> str:
    """What the run is, in a sentence or two of plain text."""
    train, test, size = run.images("train"), run.images("test"), run.image_size()
    name = train.get("name") or (Path(str(train["path"])).name if train.get("path") else train.get("source"))
    what = f"{train['n']:,} training images" if "n" in train else "Training images"
    what += (f" of {name}" if name else "") + (f" ({size} \N{MULTIPLICATION SIGN} {size} pixels)" if size else "")
    what += f" and {test['n']:,} held-out ones" if "n" in test else ""
    if run.state("tokenizer") != "done":
        return f"{what}. The tokenizer is not trained to its end yet."
    trained = [TITLES[family].lower() for family in FAMILIES if run.state(family) == "done"]
    learned = f"Trained on them: {' and '.join(trained)}." if trained else "No generator is trained yet."
    return f"{what}, each as {_tokens(run)}. {learned}"


def _tokens(run: RunFiles) -> str:
    config = run.card("tokenizer").get("config", {})
    model, kind = config.get("model", {}), config.get("quantizer", {}).get("kind")
    if model.get("architecture") == "pixels":
        return "its own pixels, without a learned tokenizer"
    side = run.image_size() // model["patch_size"] if model.get("patch_size") else 0
    tokens = f"{side} \N{MULTIPLICATION SIGN} {side} = {side * side:,} tokens" if side else "tokens"
    if kind == "kl":
        return f"{tokens} of {model['code_dim']} continuous numbers"
    return f"{tokens} from a vocabulary of {model['vocab_size']:,} codes" if "vocab_size" in model else tokens


def headline(scores: Sequence[Record]) -> list[Card]:
    """The few figures that matter most, as far as they are measured."""
    found = [_beside(scores, "Reconstruction, PSNR", "psnr", "ssim")]
    found += [_beside(scores, "Codebook usage", "usage", "perplexity")]
    found += [_distance(scores, family) for family in FAMILIES]
    found += [_best(scores, "Class accuracy", "class_accuracy"), _best(scores, "Linear probe, top-1", "probe_top1")]
    return [card for card in found if card]


def _beside(scores: Sequence[Record], label: str, name: str, other: str) -> Card | None:
    """A score of the tokenizer, with another one as aside."""
    main, second = find(scores, "tokenizer", name), find(scores, "tokenizer", other)
    aside = f"{kind_of(other).label} {written(other, second['value'])}" if second else "test images"
    return _card(label, main, aside) if main else None


def _distance(scores: Sequence[Record], family: str) -> Card | None:
    """A generator's Frechet distance beside that of real images."""
    main = find(scores, family, "fid", "fd")
    if not main:
        return None
    real = find(scores, "real", main["name"])
    aside = f"{features_of(main)} features" + (f"; real images {written(real['name'], real['value'])}" if real else "")
    return _card(f"{kind_of(main['name']).label}, {family}", main, aside)


def _best(scores: Sequence[Record], label: str, name: str) -> Card | None:
    """The best model under a score, and what it is to be held against: the baselines, or the second best.

    Other samples of a model, such as those that rejection sampling kept, stand in the table alone.
    """
    found = sorted((record for record in scores if record["name"] == name), key=lambda record: -record["value"])
    found = [record for record in found if "@" not in record["subject"]]
    models = [record for record in found if record["subject"] not in BASELINES]
    if not models:
        return None
    others = [each for each in found if each["subject"] in ("pixels", f"{models[0]['subject']}_random")] or models[1:2]
    asides = [models[0]["subject"] + (f" {models[0]['tap']}" if models[0].get("tap") else "")]
    asides += [f"{BASELINES.get(each['subject'], each['subject'])} {share_text(each['value'])}" for each in others]
    return _card(label, models[0], "; ".join(asides))


def _card(label: str, record: Record, aside: str) -> Card:
    return label, written(record["name"], record["value"]), kind_of(record["name"]).unit, aside


def _training(run: RunFiles, stage: str) -> str:
    """Curves of one stage, previews beside them, everything else folded away."""
    title = f"<h3>{escape(TITLES[stage])}"
    if run.state(stage) == "absent":
        return f"{title}</h3>{page.note('Not in this run so far.')}"
    if run.card(stage).get("config", {}).get("model", {}).get("architecture") == "pixels":
        return f"{title}</h3>{page.note('Pixels have nothing to train.')}"
    if not run.metrics(stage):
        words = "Trained, but its metrics.jsonl is missing." if run.state(stage) == "done" else "Not begun yet."
        return f"{title}</h3>{page.note(words)}"
    state = "" if run.state(stage) == "done" else "unfinished, "
    panels = curves.training_panels(run, stage)
    strip = gallery.previews(run, stage, wide=len(panels) == 1) if stage in FAMILIES else ""
    strip += gallery.filling(run) if stage == "autoregressive" else ""
    rest = "".join(curves.other_panels(run, stage))
    more = f'<details><summary>More curves</summary><div class="charts">{rest}</div></details>' if rest else ""
    opening = f'{title} <span class="soft">{state}{curves.throughput(run, stage)}</span></h3>'
    clustered = any(of_curriculum(key) for line in run.metrics(stage) for key in line)
    opening += f'<p class="soft">{CLUSTERS}</p>' if clustered else ""
    return f'{opening}<div class="charts">{"".join(panels)}{strip}</div>{more}'


def _scores(run: RunFiles) -> str:
    records = run.scores()
    if not records:
        return page.note("No scores yet: `tokenloom eval` writes eval/metrics.json.")
    told = [
        f'<p class="soft">The classifier {does} was trained on the same training images; it is right on '
        f"{share_text(card['accuracy'])} of the test images.</p>"
        for card, does in ((run.card(f"eval/{name}"), does) for name, does in CLASSIFIERS.items())
        if "accuracy" in card
    ]
    told += [f'<p class="soft">{ALIKE}</p>'] if len(told) == len(CLASSIFIERS) else []
    return "".join(told) + score_tables(records)


def _time(run: RunFiles) -> str:
    """Bars of the stages' seconds, then what each model is."""
    stages = {name: each for name, each in run.stages().items() if isinstance(each.get("seconds"), int | float)}
    seconds = [each["seconds"] for each in stages.values()]
    bars = []
    for name, each in stages.items():
        tone = next((stage for stage in STAGES if stage in name), "plain")
        width = 100 * each["seconds"] / max(*seconds, 1)
        bar = f'<span class="tone-{tone}"><i style="width:{width:.1f}%"></i></span>'
        bars.append(f"<span>{escape(name)}</span>{bar}<span>{_spent(each['seconds'])}</span>")
    told = page.note("No stage has ended yet, so there are no times.")
    if bars:
        told = f'<div class="bars">{"".join(bars)}<b>together</b><span></span><b>{_spent(sum(seconds))}</b></div>'
    return told + _models(run)


def _spent(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _models(run: RunFiles) -> str:
    rows = []
    for stage in STAGES:
        card, (steps, _) = run.card(stage), run.progress(stage)
        if card:
            weights = num_weights(run.stage_folder(stage) / "model.safetensors")
            size = f"{weights / 1e6:,.2f} M" if weights else "unknown"
            fingerprint = f"<code>{escape(str(card.get('fingerprint', '')))}</code>"
            rows.append((escape(TITLES[stage]), size, f"{steps:,}", fingerprint))
    head = ("model", "weights", "steps", "fingerprint")
    return f'<div class="narrow">{page.table(head, rows)}</div>' if rows else ""


def num_weights(path: Path) -> int:
    """Numbers stored in a safetensors file; 0 if it cannot be read."""
    try:
        with safe_open(path, "numpy") as stored:
            return sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())
    except (OSError, SafetensorError):
        return 0


def _configuration(run: RunFiles) -> str:
    try:
        text = (run.folder / "config.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return page.note("config.yaml is not there yet: it is written when the first stage ends.")
    return f"<details><summary>Every key of config.yaml, resolved</summary><pre>{escape(text)}</pre></details>"
