"""The style sheet of the report: system fonts, light and dark, phones to wide screens; charts take colours from it."""

STYLE = """
:root {
  color-scheme: light dark; --ground: #fafaf8; --card: #fff; --edge: #e3e2dc; --ink: #1d1d1b; --soft: #63625d;
  --grid: #eceae4; --tokenizer: #0f766e; --autoregressive: #2456c9; --diffusion: #b8430c; --plain: #6a6963;
  --extra-1: #7c3aed; --extra-2: #a16207;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #131417; --card: #1a1c20; --edge: #2d3036; --ink: #ececea; --soft: #a5a5a0; --grid: #282a30;
    --tokenizer: #4cc9ba; --autoregressive: #85abff; --diffusion: #ff9d66; --plain: #9d9d97; --extra-1: #bfa2ff;
    --extra-2: #e2bf57;
  }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body {
  margin: 0; background: var(--ground); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
}
main, header, footer { max-width: 1152px; margin: 0 auto; padding: 0 16px }
header { padding-top: 44px }
h1 {
  font-size: clamp(2.1rem, 6vw, 3.2rem); line-height: 1.08; letter-spacing: -.028em; margin: .1em 0 .35em;
  font-weight: 680;
}
h2 { font-size: 1.45rem; line-height: 1.2; letter-spacing: -.016em; margin: 0 0 .35em; font-weight: 640 }
h3 { font-size: 1.02rem; line-height: 1.3; margin: 28px 0 10px; font-weight: 620 }
p { margin: 0 0 1em; max-width: 70ch }
h3 .soft { font-weight: 400; font-size: .92em; margin-left: .5em }
.brand {
  font-size: .78rem; letter-spacing: .09em; text-transform: uppercase; color: var(--soft); margin: 0;
  font-weight: 600;
}
.lead { max-width: 62em; font-size: clamp(1.05rem, 2.2vw, 1.2rem); line-height: 1.5 }
.soft, .note, footer { color: var(--soft) }
.note { padding: 14px 16px; border: 1px dashed var(--edge); border-radius: 10px; max-width: none }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 26px 0 0; font-size: .92rem }
a {
  color: inherit; text-decoration: underline; text-decoration-color: var(--edge); text-underline-offset: .3em;
  text-decoration-thickness: 2px;
}
a:hover { text-decoration-color: currentColor }
:focus-visible { outline: 2px solid var(--autoregressive); outline-offset: 3px; border-radius: 3px }
section { padding: 44px 0 0; scroll-margin-top: 8px }
footer {
  margin-top: 56px; padding-top: 18px; padding-bottom: 40px; border-top: 1px solid var(--edge); font-size: .86rem;
}
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(155px, 1fr)); gap: 0 10px; margin: 24px 0 0 }
.figures > div {
  display: grid; grid-template-rows: subgrid; grid-row: span 3; background: var(--card);
  border: 1px solid var(--edge); border-radius: 12px; padding: 14px 16px; margin-bottom: 10px;
}
.figures dt { font-size: .82rem; color: var(--soft); line-height: 1.3 }
.figures dd { margin: 0 }
.figures .value {
  font-size: 1.95rem; line-height: 1.2; letter-spacing: -.03em; font-weight: 640; margin: 4px 0 6px;
  font-variant-numeric: tabular-nums; white-space: nowrap;
}
.figures .value small { font-size: .5em; letter-spacing: 0; font-weight: 520; color: var(--soft); margin-left: .22em }
.figures .aside { font-size: .8rem; line-height: 1.35; color: var(--soft) }
img { display: block; width: 100%; height: auto; border-radius: 3px; background: var(--grid) }
.pixels img { image-rendering: pixelated }
.samples {
  display: grid; grid-template-columns: minmax(48px, max-content) repeat(var(--columns), minmax(0, 1fr));
  gap: 8px 20px; align-items: center; max-width: calc(120px + var(--columns) * 480px);
}
.samples .label { font-weight: 600; max-width: 150px; font-variant-numeric: tabular-nums }
.samples .head { font-weight: 620; font-size: .95rem }
.tiles { display: grid; gap: 4px; grid-template-columns: repeat(auto-fill, minmax(68px, 1fr)) }
.samples .tiles { grid-template-columns: repeat(var(--tiles), minmax(0, 1fr)); max-width: calc(var(--tiles) * 112px) }
.samples + p, .halves + p { margin-top: 20px }
.halves { display: grid; gap: 24px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)) }
.halves h3 { margin-top: 8px }
.pairs { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)) }
.pairs > div { display: grid; grid-template-columns: 1fr 1fr; gap: 2px }
figure { margin: 0 }
.charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 326px), 1fr)) }
.chart {
  background: var(--card); border: 1px solid var(--edge); border-radius: 12px; padding: 13px 10px 8px 12px;
  min-width: 0;
}
.chart figcaption { font-weight: 600; font-size: .92rem; line-height: 1.3 }
.chart svg { display: block; width: 100%; max-width: 440px; height: auto; margin-top: 6px }
.chart .note { border: 0; padding: 20px 0 }
.strip { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); margin-top: 10px }
.wide .strip { grid-template-columns: repeat(auto-fit, minmax(104px, 1fr)) }
.strip p, .words { margin: 3px 0 0; font-size: .78rem; color: var(--soft) }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; font-family: inherit }
svg .grid { stroke: var(--grid) }
svg .axis { stroke: var(--edge) }
svg .curve { fill: none; stroke: var(--tone); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round }
svg .thin { stroke-width: 1.2; stroke-dasharray: 1 4 }
svg .level { stroke-width: 1.5; stroke-dasharray: 6 4 }
svg .span { stroke: var(--tone); stroke-width: 1.2; opacity: .55 }
svg circle { fill: var(--tone) }
svg .marked { fill: var(--card); stroke: var(--tone); stroke-width: 2.6 }
svg .area { fill: var(--tone); opacity: .78 }
svg .cells { fill: var(--tone); shape-rendering: crispEdges }
svg .bound { fill: none; stroke: var(--ink); stroke-width: 1.1; stroke-dasharray: 5 3 }
svg .halo { stroke: var(--card); stroke-width: 2.1; stroke-dasharray: none }
.legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: 1px 14px; margin: 3px 0 0; padding: 0; font-size: .8rem;
  color: var(--soft); font-variant-numeric: tabular-nums;
}
.key {
  display: inline-block; width: 14px; height: 0; border-top: 2.5px solid var(--tone); margin-right: 6px;
  vertical-align: .24em;
}
.key.level { border-top-style: dashed }
.key.dots { width: 7px; height: 7px; border: 0; border-radius: 50%; background: var(--tone); vertical-align: .04em }
.key.steps { width: 9px; height: 9px; border: 0; border-radius: 2px; background: var(--tone); vertical-align: -.02em }
.key.shade, .key.empty { width: 14px; height: 11px; border: 0; vertical-align: -.08em; background: var(--tone) }
.key.empty { background: none; border: 1px solid var(--edge) }
.tone-ink { --tone: var(--ink) }
.tone-tokenizer { --tone: var(--tokenizer) }
.tone-autoregressive { --tone: var(--autoregressive) }
.tone-diffusion { --tone: var(--diffusion) }
.tone-plain { --tone: var(--plain) }
.tone-extra-1 { --tone: var(--extra-1) }
.tone-extra-2 { --tone: var(--extra-2) }
.columns { display: grid; gap: 6px 36px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)) }
.box { overflow-x: auto }
.narrow { max-width: 760px }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td {
  text-align: right; padding: 7px 0 7px 14px; border-bottom: 1px solid var(--edge); vertical-align: baseline;
  white-space: nowrap; overflow-wrap: normal;
}
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 7em }
thead th { font-weight: 520; color: var(--soft); font-size: .82rem }
tbody th { font-weight: 560 }
tbody small { display: block; font-weight: 400; color: var(--soft); font-size: .8rem; line-height: 1.35 }
td b { font-weight: 640 }
details { margin: 12px 0 0; font-size: .88rem }
summary { cursor: pointer; color: var(--soft); padding: 3px 0 }
summary:hover { color: var(--ink) }
.facts {
  display: grid; grid-template-columns: minmax(90px, max-content) minmax(0, 1fr); gap: 2px 16px;
  margin: 6px 0 16px;
}
.facts dt { color: var(--soft) }
.facts dd { margin: 0 }
.chart .facts { font-size: .88rem; margin: 8px 0 }
details h4 { margin: 12px 0 0; font-size: .88rem; font-weight: 620 }
pre {
  overflow-x: auto; background: var(--card); border: 1px solid var(--edge); border-radius: 12px; padding: 16px;
  margin: 8px 0 0; font: .82rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; overflow-wrap: normal;
}
.bars {
  display: grid; grid-template-columns: minmax(0, max-content) minmax(40px, 1fr) max-content; gap: 9px 14px;
  align-items: center; margin: 0 0 22px; font-variant-numeric: tabular-nums; max-width: 760px; font-size: .94rem;
}
.bars > :nth-child(3n) { text-align: right }
.bars i { display: block; height: 9px; border-radius: 5px; background: var(--tone); min-width: 3px }
@media (min-width: 1080px) {
  .wide { grid-column: span 2 }
}
@media (max-width: 640px) {
  header { padding-top: 28px }
  section { padding-top: 36px }
  .figures { grid-template-columns: 1fr 1fr }
  .figures > div { padding: 12px 13px }
  .figures .value { font-size: 1.65rem }
  .samples { grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 4px 16px }
  .samples .corner { display: none }
  .samples .label { grid-column: 1 / -1; max-width: none; margin-top: 7px; line-height: 1.3 }
  .samples .tiles { grid-template-columns: repeat(auto-fill, minmax(44px, 1fr)); max-width: none }
  .bars { gap: 9px 10px }
  table { font-size: .84rem }
  th, td { padding-left: 9px }
  th:first-child, td:first-child { min-width: 6.2em }
  code { font-size: .92em }
}
@media print {
  body { background: #fff }
  .chart, .figures > div, pre { break-inside: avoid }
  nav { display: none }
}
"""
