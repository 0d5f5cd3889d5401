"""The pieces of a self-contained HTML page: style, tiles, tables, key-value lists. Knows nothing of runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

# The policy makes the browser itself refuse anything that is not in the file.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root{color-scheme:light dark;--ground:#fafaf8;--card:#fff;--edge:#e3e2dc;--ink:#1d1d1b;--soft:#63625d;--grid:#eceae4;
--tokenizer:#0f766e;--autoregressive:#2456c9;--diffusion:#b8430c;--plain:#6a6963;--extra-1:#7c3aed;--extra-2:#a16207}
@media (prefers-color-scheme:dark){:root{--ground:#131417;--card:#1a1c20;--edge:#2d3036;--ink:#ececea;--soft:#a5a5a0;
--grid:#282a30;--tokenizer:#4cc9ba;--autoregressive:#85abff;--diffusion:#ff9d66;--plain:#9d9d97;--extra-1:#bfa2ff;
--extra-2:#e2bf57}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--ground);color:var(--ink);overflow-wrap:anywhere;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header,footer{max-width:1152px;margin:0 auto;padding:0 16px}
header{padding-top:44px}
h1{font-size:clamp(2.1rem,6vw,3.2rem);line-height:1.08;letter-spacing:-.028em;margin:.1em 0 .35em;font-weight:680}
h2{font-size:1.45rem;line-height:1.2;letter-spacing:-.016em;margin:0 0 .35em;font-weight:640}
h3{font-size:1.02rem;line-height:1.3;margin:28px 0 10px;font-weight:620}
p{margin:0 0 1em;max-width:70ch}
.brand{font-size:.78rem;letter-spacing:.09em;text-transform:uppercase;color:var(--soft);margin:0;font-weight:600}
.lead{font-size:clamp(1.05rem,2.2vw,1.2rem);line-height:1.5}
.soft,.note,footer{color:var(--soft)}
.note{padding:14px 16px;border:1px dashed var(--edge);border-radius:10px;max-width:none}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:26px 0 0;font-size:.92rem}
a{color:inherit;text-decoration:underline;text-decoration-color:var(--edge);text-underline-offset:.3em;
text-decoration-thickness:2px}
a:hover{text-decoration-color:currentColor}
:focus-visible{outline:2px solid var(--autoregressive);outline-offset:3px;border-radius:3px}
section{padding:44px 0 0;scroll-margin-top:8px}
footer{margin-top:56px;padding-top:18px;padding-bottom:40px;border-top:1px solid var(--edge);font-size:.86rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(155px,1fr));gap:0 10px;margin:24px 0 0}
.figures>div{display:grid;grid-template-rows:subgrid;grid-row:span 3;background:var(--card);border:1px solid var(--edge);border-radius:12px;
padding:14px 16px;margin-bottom:10px}
.figures dt{font-size:.82rem;color:var(--soft);line-height:1.3}
.figures dd{margin:0}
.figures .value{font-size:1.95rem;line-height:1.2;letter-spacing:-.03em;font-weight:640;margin:4px 0 6px;
font-variant-numeric:tabular-nums;white-space:nowrap}
.figures .value small{font-size:.5em;letter-spacing:0;font-weight:520;color:var(--soft);margin-left:.22em}
.figures .aside{font-size:.8rem;line-height:1.35;color:var(--soft)}
img{display:block;width:100%;height:auto;border-radius:3px;background:var(--grid)}
.pixels img{image-rendering:pixelated}
.samples{display:grid;grid-template-columns:minmax(48px,max-content) repeat(var(--columns),minmax(0,1fr));gap:8px 20px;
align-items:center;max-width:calc(120px + var(--columns)*480px)}
.samples .label{font-weight:600;max-width:150px;font-variant-numeric:tabular-nums}
.samples .head{font-weight:620;font-size:.95rem}
.tiles{display:grid;gap:4px;grid-template-columns:repeat(auto-fill,minmax(44px,1fr))}
.samples .tiles{grid-template-columns:repeat(6,minmax(0,1fr))}
.halves{display:grid;gap:24px;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr))}
.halves h3{margin-top:8px}
.pairs{display:grid;gap:10px;grid-template-columns:repeat(auto-fill,minmax(128px,1fr))}
.pairs>div{display:grid;grid-template-columns:1fr 1fr;gap:2px}
figure{margin:0}
.charts{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,326px),1fr))}
.chart{background:var(--card);border:1px solid var(--edge);border-radius:12px;padding:13px 10px 8px 12px;min-width:0}
.chart figcaption{font-weight:600;font-size:.92rem;line-height:1.3}
.chart svg{display:block;width:100%;max-width:440px;height:auto;margin-top:6px}
.chart .note{border:0;padding:20px 0}
.strip{display:grid;gap:10px;grid-template-columns:repeat(auto-fill,minmax(104px,1fr));margin-top:10px}
.strip p{margin:3px 0 0;font-size:.78rem;color:var(--soft)}
svg text{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums;font-family:inherit}
svg .grid{stroke:var(--grid)}
svg .axis{stroke:var(--edge)}
svg .curve{fill:none;stroke:var(--tone);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
svg .thin{stroke-width:1.2;stroke-dasharray:1 4}
svg .level{stroke-width:1.5;stroke-dasharray:6 4}
svg .span{stroke:var(--tone);stroke-width:1.2;opacity:.55}
svg circle{fill:var(--tone)}
svg .marked{fill:var(--card);stroke:var(--tone);stroke-width:2.6}
svg .area{fill:var(--tone);opacity:.78}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:1px 14px;margin:3px 0 0;padding:0;font-size:.8rem;
color:var(--soft);font-variant-numeric:tabular-nums}
.key{display:inline-block;width:14px;height:0;border-top:2.5px solid var(--tone);margin-right:6px;vertical-align:.24em}
.key.level{border-top-style:dashed}
.key.dots{width:7px;height:7px;border:0;border-radius:50%;background:var(--tone);vertical-align:.04em}
.key.steps{width:9px;height:9px;border:0;border-radius:2px;background:var(--tone);vertical-align:-.02em}
.tone-tokenizer{--tone:var(--tokenizer)}.tone-autoregressive{--tone:var(--autoregressive)}
.tone-diffusion{--tone:var(--diffusion)}.tone-plain{--tone:var(--plain)}
.tone-extra-1{--tone:var(--extra-1)}.tone-extra-2{--tone:var(--extra-2)}
.columns{display:grid;gap:6px 36px;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr))}
.box{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:7px 0 7px 14px;border-bottom:1px solid var(--edge);vertical-align:baseline;
white-space:nowrap;overflow-wrap:normal}
th:first-child,td:first-child{text-align:left;padding-left:0;white-space:normal;min-width:7em}
thead th{font-weight:520;color:var(--soft);font-size:.82rem}
tbody th{font-weight:560}
tbody th small{display:block;font-weight:400;color:var(--soft);font-size:.8rem;line-height:1.35}
td.value{font-weight:640}
details{margin:12px 0 0;font-size:.88rem}
summary{cursor:pointer;color:var(--soft);padding:3px 0}
summary:hover{color:var(--ink)}
.facts{display:grid;grid-template-columns:minmax(90px,max-content) minmax(0,1fr);gap:2px 16px;margin:6px 0 16px}
.facts dt{color:var(--soft)}
.facts dd{margin:0}
details h4{margin:12px 0 0;font-size:.88rem;font-weight:620}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--edge);border-radius:12px;padding:16px;margin:8px 0 0;
font:.82rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:normal}
.bars{display:grid;grid-template-columns:max-content minmax(40px,1fr) max-content;gap:9px 14px;align-items:center;
margin:0 0 22px;font-variant-numeric:tabular-nums;max-width:760px;font-size:.94rem}
.bars i{height:9px;border-radius:5px;background:var(--tone);min-width:3px}
@media (min-width:1080px){.wide{grid-column:span 2}}
@media (max-width:640px){header{padding-top:28px}section{padding-top:36px}
.figures{grid-template-columns:1fr 1fr}.figures>div{padding:12px 13px}.figures .value{font-size:1.65rem}
.samples{grid-template-columns:repeat(var(--columns),minmax(0,1fr));gap:4px 16px}
.samples .corner{display:none}.samples .label{grid-column:1/-1;max-width:none;margin-top:7px;line-height:1.3}
.samples .tiles{grid-template-columns:repeat(auto-fill,minmax(44px,1fr))}
.bars{gap:9px 10px}th,td{padding-left:10px}}
@media print{body{background:#fff}.chart,.figures>div,pre{break-inside:avoid}nav{display:none}}
"""


def document(*, title: str, header: str, sections: Sequence[str], footer: str) -> str:
    """The whole page; all arguments but the title are HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header>{header}</header>\n<main>\n" + "\n".join(sections) + f"\n</main>\n<footer>{footer}</footer>\n</body>\n</html>\n"
    )


def section(name: str, title: str, *content: str, intro: str = "") -> str:
    """A chapter with the anchor `name`; title and intro are plain text."""
    opening = f'<p class="soft">{prose(intro)}</p>' if intro else ""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{opening}{"".join(content)}</section>'


def note(text: str) -> str:
    """What is not there, in words of plain text."""
    return f'<p class="note">{prose(text)}</p>'


def prose(text: str) -> str:
    """Plain text, with what stands between backticks set as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def figures(cards: Iterable[tuple[str, str, str, str]]) -> str:
    """Large numbers: label, value, unit, aside; all plain text."""
    rows = (
        f'<div><dt>{escape(label)}</dt><dd class="value">{escape(value)}<small>{escape(unit)}</small></dd>'
        f'<dd class="aside">{escape(aside)}</dd></div>'
        for label, value, unit, aside in cards
    )
    return f'<dl class="figures">{"".join(rows)}</dl>'


def picture(uri: str, alt: str) -> str:
    """One embedded picture; its text is also shown on hovering."""
    return f'<img src="{uri}" alt="{escape(alt)}" title="{escape(alt)}">'


def facts(values: Mapping[str, Any]) -> str:
    """Nested values as a list of dotted keys and plain values."""
    rows = (f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in flattened(values))
    return f'<dl class="facts">{"".join(rows)}</dl>'


def flattened(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Leaves of nested values, as text."""
    leaves: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            leaves += flattened(value, f"{prefix}{key} \N{MIDDLE DOT} ")
        else:
            leaves.append((f"{prefix}{key}", _plain(value)))
    return leaves


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in a box that scrolls by itself; the head is plain text, cells are HTML, the first one of a row names it."""
    top = "".join(f'<th scope="col">{escape(each)}</th>' for each in head)
    body = "".join(f'<tr><th scope="row">{row[0]}</th>{"".join(_cell(cell) for cell in row[1:])}</tr>' for row in rows)
    return f'<div class="box"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(content: str) -> str:
    return f"<td>{content}</td>"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None or value == {} else f"{value:,.10g}" if isinstance(value, float) else str(value)
