"""The look of the pages of reports."""

__all__ = ["ROWS", "STYLE"]

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #2a8f4f; --bad: #d03b3b;
  --model: #2f6fd0; --own: #9a9a9a; --text: #555; }
@media (prefers-color-scheme: dark) { :root { --good: #2f9e58; --bad: #e5534b; --model: #6ea8fe;
  --own: #808080; --text: #aaa; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
p { margin: .3rem 0 .6rem; }
.badge { color: #fff; border-radius: .4rem; padding: .1rem .6rem; }
.good { background: var(--good); } .badge.bad { background: var(--bad); }
.soft, .notes { color: var(--text); font-size: .9rem; }
.notes { border-left: .25rem solid #d9a400; padding: .2rem 0 .2rem 1.6rem; }
.wide { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; font-variant-numeric: tabular-nums; }
th { background: Canvas; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; min-width: 11rem; overflow-wrap: anywhere; }
td + td { white-space: nowrap; }
tr.failed td { background: #d03b3b22; }
code { font: .92em ui-monospace, monospace; overflow-wrap: anywhere; }
.reason { color: var(--bad); font-size: .85rem; }
.bar { background: var(--soft); height: .6rem; width: 6rem; display: inline-block; }
.bar i { display: block; height: 100%; background: var(--good); }
.failed .bar i { background: var(--bad); }
.formula { border-left: .25rem solid var(--line); padding-left: .8rem; margin: .8rem 0; }
.formula p { margin: .1rem 0; }
dl { display: grid; grid-template-columns: 9rem 1fr; gap: .15rem .8rem; margin: .6rem 0; }
dt { color: var(--text); } dd { margin: 0; overflow-wrap: anywhere; }
.figures { display: flex; flex-wrap: wrap; gap: 1.5rem; } figure { margin: 0; }
figcaption { font-weight: 600; font-size: .9rem; }
svg { display: block; } figure svg { max-width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--text); }
svg line { stroke: var(--line); } svg line.limit { stroke: var(--bad); stroke-dasharray: 4 3; }
svg .cell { fill: var(--model); } svg .own { fill: var(--own); } svg .bad { fill: var(--bad); }
svg .none { fill: none; stroke: var(--line); fill-opacity: 1; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; } th, td { padding: .25rem .4rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; }
}
"""

ROWS = """
.row { display: grid; grid-template-columns: 5.5rem 14.5rem minmax(0, 1fr); gap: 0 1.2rem;
  border-top: 1px solid var(--line); padding: 1rem 0; }
.layer small { display: block; color: var(--text); } .layer b { font-size: 1.05rem; }
.sheet > p:first-child { margin-top: 0; } .row .sheet dl { grid-template-columns: 5.5rem 1fr; }
.sheet dl, .sheet details { font-size: .9rem; }
.badge.plain { background: #6b6b6b; } .path .badge { font-size: .8rem; white-space: nowrap; }
details.formula > code { display: block; margin-top: .4rem; }
details ul { columns: 22rem; padding-left: 1.2rem; margin: .3rem 0; } summary { cursor: pointer; }
.pictures { display: flex; flex-wrap: wrap; gap: .8rem 1.2rem; align-content: start; }
.pictures figure { max-width: 14.5rem; }
.pictures figcaption { font-weight: 400; font-size: .8rem; line-height: 1.35; color: var(--text);
  padding-left: 48px; }
.pictures .was svg { width: 8rem; height: auto; margin-left: 20px; }
svg .field { fill: var(--soft); } svg .seen { fill: var(--model); }
svg .mesh { stroke: Canvas; stroke-width: 1; fill: none; } svg .hatch { fill: var(--model); }
.heads { display: inline-flex; flex-wrap: wrap; gap: 3px 5px; vertical-align: middle; }
.heads span { display: inline-flex; gap: 1px; }
.heads i { width: 9px; height: 9px; background: var(--model); display: block; }
.heads span:nth-child(even) i { background: var(--own); }
.heads.alone { gap: 2px; } .heads.alone i { background: var(--model) !important; }
.others { padding-left: 1.2rem; } .others li { margin: .4rem 0; }
@media (max-width: 52rem) {
  .row { grid-template-columns: 1fr; gap: .6rem; }
  .layer small { display: inline; margin-right: .4rem; } .pictures figure { max-width: 100%; }
}
"""
