"""The pictures of a report: samples by class or with their texts, restored images and reconstructions beside originals,
previews on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tokenloom import page
from tokenloom.pictures import (
    cut_grid,
    data_uri,
    last_pairs,
    montage,
    read_picture,
    rows_by_class,
    sample_path,
    shown_classes,
    shrunk,
)
from tokenloom.run_files import FAMILIES, RunFiles
from tokenloom.score_table import TITLES, find, share_text

CLASSES, PER_CLASS, PLAIN_SAMPLES, PAIRS, PREVIEWS, FILLING = 10, 6, 36, 16, 6, 4
PIXELATED_BELOW = 96  # pixels; smaller pictures are enlarged without smoothing
SECTION_PIXELS = 700_000  # of all pictures of a section together; where that is too few, they are shrunk
NOT_SAMPLED = {
    "done": "trained, but no samples are drawn yet (`tokenloom sample`).",
    "training": "still in training, so there are no samples yet.",
    "planned": "not trained yet.",
}
NEIGHBOURS = (
    "A generator that copies its training images shows here. On each line a sample, then the training images that look"
    " most like it to the main features; the lines are the nearest pairs of all samples. Numbers are distances, 1 the"
    " usual one of a real image that was not trained on."
)
RESTORED = (
    "On each line a smaller image, the sample that was drawn from it, with its PSNR, and the original. They are spread"
    " evenly over the test images."
)
Told = dict[str, Any]  # samples.json


def samples(run: RunFiles) -> str:
    """Samples of all families: by class where they have classes, else a plain grid; then sheets of restored images."""
    told = {family: run.samples(family) for family in FAMILIES}
    by_class = {family: each for family, each in told.items() if each and max(each["labels"], default=-1) >= 0}
    plain = {family: each for family, each in told.items() if each and family not in by_class}
    parts = [_by_class(run, by_class)] if by_class else []
    parts += [_plain(run, plain)] if plain else []
    parts += [f'<p class="soft">{escape(_how(family, each))}</p>' for family, each in told.items() if each]
    for family in FAMILIES:
        if not told[family] and run.state(family) != "absent":
            parts.append(page.note(f"{TITLES[family]}: {NOT_SAMPLED[run.state(family)]}"))
    if any(told.values()):
        shown = "Rows are classes; these are the first samples of each." if by_class else "These are the first samples."
        parts.insert(0, f'<p class="soft">{shown} Nothing is picked.</p>')
    parts += _sheets(run, "restored", RESTORED, "smaller images, samples and originals")
    return "".join(parts) or page.note("No generator in this run so far, hence no samples.")


def reconstructions(run: RunFiles) -> str:
    """Pairs of test images and what the tokenizer makes of their codes."""
    pairs = last_pairs(run)[:PAIRS]
    if run.card("tokenizer").get("config", {}).get("model", {}).get("architecture") == "pixels":
        return page.note("Latents are the pixels themselves: every image comes back exactly.")
    if not pairs:
        return page.note("No previews of reconstructions yet: the tokenizer writes them as it is trained.")
    side = _side(2 * PAIRS)
    rows = []
    for number, pair in enumerate(pairs, start=1):
        names = (f"test image {number}", f"reconstruction of test image {number}")
        shown = (page.picture(data_uri(shrunk(each, side)), name) for each, name in zip(pair, names, strict=True))
        rows.append(f"<div>{''.join(shown)}</div>")
    told = "Pairs: on the left a test image, on the right what the decoder makes of its codes."
    return f'<p class="soft">{told}</p><div class="pairs{_look(run)}">{"".join(rows)}</div>'


def neighbours(run: RunFiles) -> str:
    """Sheets of the samples nearest to training images, one for each family, with the share of copies."""
    asides = {family: _copies(run, family) for family in FAMILIES}
    sheets = _sheets(run, "neighbours", NEIGHBOURS, "samples and nearest training images", asides)
    return "".join(sheets) or page.note("No sheets so far: `tokenloom eval` draws them with eval.neighbours above 0.")


def _sheets(run: RunFiles, kind: str, intro: str, what: str, asides: Mapping[str, str] | None = None) -> list[str]:
    """The sheets eval/<kind>-<family>.png behind an intro, none if there are none; asides, HTML, stand in headings."""
    sheets = {family: read_picture(run.folder / "eval" / f"{kind}-{family}.png") for family in FAMILIES}
    found = {family: sheet for family, sheet in sheets.items() if sheet is not None}
    parts = []
    for family, sheet in found.items():
        height, width = sheet.shape[:2]
        side = int(max(height, width) * math.sqrt(SECTION_PIXELS / len(found) / (height * width)))
        picture = page.picture(data_uri(shrunk(sheet, side)), f"{TITLES[family]}: {what}")
        parts.append(f"<div><h3>{escape(TITLES[family])}{(asides or {}).get(family, '')}</h3>{picture}</div>")
    return [f'<p class="soft">{intro}</p><div class="halves">{"".join(parts)}</div>'] if parts else []


def _copies(run: RunFiles, family: str) -> str:
    """The share of copies, as far as it is measured."""
    record = find(run.scores(), family, "copies")
    text = f"copies: {share_text(record['value'])} of {record.get('n') or 0:,} samples" if record else ""
    return f' <span class="soft">{escape(text)}</span>' if text else ""


def previews(run: RunFiles, stage: str, *, wide: bool) -> str:
    """How a generator's previews changed in training; empty if it wrote none."""
    found = run.previews(stage, "samples")
    last = len(found) - 1
    chosen = sorted({round(place * last / (PREVIEWS - 1)) for place in range(PREVIEWS)}) if last >= 0 else []
    pictures = []
    for step, path in (found[place] for place in chosen):
        tiles = [shrunk(tile, _side(PREVIEWS * 16)) for tile in cut_grid(path, run.image_size())]
        if tiles:
            uri = data_uri(montage(tiles, math.isqrt(len(tiles)), gap=max(1, tiles[0].shape[0] // 32)))
            pictures.append(f"<div>{page.picture(uri, f'{stage} preview at step {step:,}')}<p>step {step:,}</p></div>")
    if not pictures:
        return ""
    figure = f'<figure class="chart{" wide" if wide else ""}"><figcaption>Samples on the way</figcaption>'
    return f'{figure}<div class="strip{_look(run)}">{"".join(pictures)}</div></figure>'


def filling(run: RunFiles) -> str:
    """How an autoregressive image fills in, code by code, from the newest preview; empty if there is none."""
    for step, path in reversed(run.previews("autoregressive", "partial")):
        tiles = cut_grid(path, run.image_size())
        if tiles:
            columns = math.isqrt(len(tiles))
            rows = [shrunk(tile, _side(4 * columns**2)) for tile in tiles[: FILLING * columns]]
            uri = data_uri(montage(rows, columns, gap=max(1, rows[0].shape[0] // 32)))
            picture = page.picture(uri, f"images filling in at step {step:,}")
            figure = '<figure class="chart"><figcaption>Code by code, from left to right</figcaption>'
            return f'{figure}<div class="strip{_look(run)}"><div>{picture}<p>step {step:,}</p></div></div></figure>'
    return ""


def _by_class(run: RunFiles, told: dict[str, Told]) -> str:
    """A row for each class, a cell for each family."""
    classes = shown_classes(*(each["labels"] for each in told.values()), limit=CLASSES)
    names: list[str] = next((each["class_names"] for each in told.values() if each.get("class_names")), [])
    chosen = {family: rows_by_class(each["labels"], classes, PER_CLASS) for family, each in told.items()}
    across = max(len(rows) for each in chosen.values() for rows in each)
    side = _side(len(classes) * len(told) * across)
    cells = ['<div class="corner"></div>', *(f'<div class="head">{escape(TITLES[family])}</div>' for family in told)]
    for place, label in enumerate(classes):
        name = str(names[label]) if label < len(names) else f"class {label}"
        cells.append(f'<div class="label">{escape(name)}</div>')
        for family, rows in chosen.items():
            cells.append(_tiles(run, family, told[family], rows[place], side, f", class {name}"))
    counts = f"--columns:{len(told)};--tiles:{across}"
    return f'<div class="samples{_look(run)}" style="{counts}">{"".join(cells)}</div>'


def _plain(run: RunFiles, told: dict[str, Told]) -> str:
    """Samples without classes: a grid for each family."""
    side = _side(len(told) * PLAIN_SAMPLES)
    grids = []
    for family, each in told.items():
        rows = range(min(PLAIN_SAMPLES, len(each["labels"])))
        grids.append(f"<div><h3>{escape(TITLES[family])}</h3>{_tiles(run, family, each, rows, side, '')}</div>")
    return f'<div class="halves{_look(run)}">{"".join(grids)}</div>'


def _tiles(run: RunFiles, family: str, told: Told, rows: Sequence[int], side: int, what: str) -> str:
    shown = []
    for row in rows:
        pixels = read_picture(sample_path(run, family, row))
        if pixels is not None:
            name = f"{TITLES[family]}{what}, seed {told['seeds'][row]}"
            shown.append(page.picture(data_uri(shrunk(pixels, side)), name))
    return f'<div><div class="tiles">{"".join(shown)}</div>{_prompts(told, rows)}</div>'


def _prompts(told: Told, rows: Sequence[int]) -> str:
    """The texts of these samples in their order, each once; empty where they have none."""
    texts = dict.fromkeys(told["prompts"][row] or "no text" for row in rows) if told.get("prompts") else {}
    words = " \N{MIDDLE DOT} ".join(texts)
    return f'<p class="words">{escape(words)}</p>' if texts else ""


def _how(family: str, told: Told) -> str:
    settings = (f"{key.replace('_', ' ')} {page.plain(value)}" for key, value in told.get("settings", {}).items())
    return f"{TITLES[family]}: {len(told['labels']):,} samples in all, {', '.join(settings) or 'settings unknown'}."


def _side(count: int) -> int:
    """Largest side at which so many pictures keep a section within SECTION_PIXELS."""
    return max(24, math.isqrt(SECTION_PIXELS // max(1, count)))


def _look(run: RunFiles) -> str:
    return " pixels" if 0 < run.image_size() < PIXELATED_BELOW else ""
