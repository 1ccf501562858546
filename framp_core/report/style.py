"""The style sheet of the report; a Python file so that every way of packaging the code carries it."""

CSS = """\
:root { color-scheme: light; --ink: #1f2933; --muted: #5b6773; --rule: #dfe4e9; --wash: #f6f8fa; --accent: #225ea8; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.5rem, 4.5vw, 2.1rem); line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; letter-spacing: -0.01em; margin: 2.75rem 0 0.9rem; padding-top: 1.1rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 0 0 0.5rem; }
p { margin: 0 0 0.9rem; max-width: 46rem; }
.lead { font-size: 1.06rem; color: var(--muted); }
.warning { background: #fff4dc; border-left: 4px solid #e69f00; border-radius: 0 6px 6px 0; padding: 0.7rem 1rem; }
.scroll { overflow-x: auto; margin: 0 0 1.2rem; }
table { border-collapse: collapse; font-size: 0.93rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.42rem 0.9rem 0.42rem 0; text-align: right; white-space: nowrap; }
th + th, td + td { padding-left: 0.9rem; }
th { font-weight: 600; color: var(--muted); border-bottom: 1.5px solid var(--ink); vertical-align: bottom;
  white-space: normal; }
td { border-bottom: 1px solid var(--rule); }
.label { text-align: left; }
tr.sum td { font-weight: 650; border-top: 1.5px solid var(--ink); border-bottom: 0; }
small { color: var(--muted); font-weight: 400; font-size: 0.82em; }
.facts td:last-child { white-space: normal; overflow-wrap: anywhere; }
.facts thead { display: none; }
.facts td:first-child { color: var(--muted); vertical-align: top; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1.1rem; margin: 0; max-width: 58rem;
  font-size: 0.9rem; color: var(--muted); }
dt { font-weight: 600; color: var(--ink); }
dd { margin: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 2.2rem 2.5rem; }
figure { margin: 0; min-width: 0; max-width: 34rem; }
figure img { display: block; width: 100%; height: auto; }
figcaption { font-size: 0.86rem; line-height: 1.45; color: var(--muted); margin-top: 0.5rem; }
details { border: 1px solid var(--rule); border-radius: 8px; padding: 0.55rem 0.9rem; }
details[open] { padding-bottom: 0.2rem; }
summary { cursor: pointer; font-weight: 600; color: var(--accent); }
details > .scroll, details > pre { margin-top: 0.8rem; }
pre { background: var(--wash); border-radius: 6px; padding: 0.9rem 1rem; overflow-x: auto; font-size: 0.84rem;
  line-height: 1.45; font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
ul { padding-left: 1.2rem; margin: 0; }
ul + details { margin-top: 0.9rem; }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem; }
  table { font-size: 0.85rem; }
  th, td { padding-right: 0.45rem; }
  th + th, td + td { padding-left: 0.45rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 0.5rem; }
}
@media print { details { border: 0; } figure { break-inside: avoid; } }
"""
