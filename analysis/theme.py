"""Colours and type of charts and page. The palette is Okabe and Ito's (colour-blind-safe)."""

INK, MUTED, RULE, PAPER = "#1c2733", "#5c6b7a", "#dfe5eb", "#ffffff"
BLUE, LIGHT_BLUE = "#0b5d9e", "#79b4de"
SAFE, UNSAFE, UNRESOLVED = "#00805f", "#c4500a", "#6b6b6b"
MEASURED, UNMEASURED = "#d9e8f5", "#efefec"  # of a leg: the window, and warm-up with drain
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

CHART = {  # Vega-Lite config
    "font": FONT, "background": PAPER, "view": {"stroke": None},
    "axis": {"labelColor": MUTED, "titleColor": MUTED, "gridColor": "#edf0f3",
             "domainColor": RULE, "tickColor": RULE, "labelFontSize": 11, "titleFontSize": 12,
             "titleFontWeight": "normal", "labelOverlap": True, "titlePadding": 8},
    "legend": {"orient": "bottom", "labelColor": MUTED, "titleColor": MUTED, "labelFontSize": 11,
               "titleFontSize": 12, "titleFontWeight": "normal", "symbolStrokeWidth": 3},
    "title": {"anchor": "start", "color": INK, "fontSize": 13, "fontWeight": 600, "offset": 10},
    "text": {"color": INK, "fontSize": 11},
}

CSS = """
:root { color-scheme: light; --ink: #1c2733; --muted: #5c6b7a; --rule: #dfe5eb; --wash: #f6f8fa;
  --safe: #00805f; --unsafe: #c4500a; --unresolved: #6b6b6b; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); line-height: 1.55; font-size: 16px;
  font-family: FONT; -webkit-text-size-adjust: 100%; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
p { margin: 0 0 10px; max-width: 76ch; }
h2 { font-size: 20px; line-height: 1.3; margin: 56px 0 6px; letter-spacing: -.01em; }
h3 { font-size: 15px; margin: 28px 0 6px; }
.muted, figcaption, .about { color: var(--muted); font-size: 14px; }
.about { margin-bottom: 18px; overflow-wrap: anywhere; }
.verdict { border-left: 6px solid var(--tone); background: var(--wash); border-radius: 4px;
  padding: 24px 28px; }
.verdict h1 { font-size: 30px; line-height: 1.22; margin: 12px 0; letter-spacing: -.015em;
  text-wrap: balance; }
.verdict p:first-of-type { font-size: 18px; }
.verdict p:last-child { margin: 0; }
.badge { display: inline-block; font-size: 12px; font-weight: 650; letter-spacing: .04em;
  border: 1px solid var(--tone); color: var(--tone); border-radius: 99px; padding: 2px 11px;
  margin: 0 6px 4px 0; background: #fff; }
.badge.full { background: var(--tone); color: #fff; }
.safe, .valid { --tone: var(--safe); } .unsafe, .invalid { --tone: var(--unsafe); }
.unresolved, .suspect, .note { --tone: var(--unresolved); } .suspect { --tone: #8a6100; }
.keys { display: grid; grid-template-columns: repeat(4, 1fr); margin: 20px 0 12px;
  border: 1px solid var(--rule); border-width: 1px 0 0 1px; }
.keys div { padding: 14px 18px; border: 1px solid var(--rule); border-width: 0 1px 1px 0; }
.keys dt { color: var(--muted); font-size: 13px; }
.keys dd { margin: 0; font-size: 24px; font-weight: 600; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; }
.keys small { display: block; font-size: 13px; font-weight: 400; color: var(--muted);
  letter-spacing: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  gap: 20px 36px; }
figure { margin: 14px 0 0; min-width: 0; }
figure > div { width: 100%; min-width: 0; }
figcaption { margin-top: 4px; }
.key { display: inline-block; margin-right: 14px; }
.key i { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 5px;
  vertical-align: -1px; }
.scroll { overflow-x: auto; margin: 12px 0; border: 1px solid var(--rule); border-radius: 4px; }
table { border-collapse: collapse; width: 100%; font-size: 13px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 7px 8px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
tr:last-child td { border-bottom: 0; }
th { color: var(--muted); font-weight: 500; background: var(--wash); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff;
  font-weight: 600; }
th:first-child { background: var(--wash); }
td:first-child, th:first-child { padding-left: 12px; }
th:nth-child(2):last-child { text-align: left; }
th.words, td.words { text-align: left; } td.words span { white-space: nowrap; }
td.text { text-align: left; white-space: normal; min-width: 240px; overflow-wrap: anywhere; }
td.safe, td.unsafe, td.invalid, td.suspect { color: var(--tone); font-weight: 600; }
.findings { list-style: none; padding: 0; margin: 12px 0; }
.findings li { border-left: 3px solid var(--tone); padding: 2px 0 2px 14px; margin: 0 0 14px; }
.terms { display: grid; grid-template-columns: 110px 1fr; gap: 6px 16px; font-size: 14px; }
.terms dt { font-weight: 600; } .terms dd { margin: 0; color: var(--muted); }
details { margin-top: 40px; } summary { cursor: pointer; color: var(--muted); }
pre { background: var(--wash); padding: 16px; overflow-x: auto; font-size: 12px;
  border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere; }
.vega-embed { padding: 0 !important; } .vega-embed svg { overflow: visible; display: block; }
@media (max-width: 600px) { main { padding: 16px 14px 40px; } .verdict { padding: 18px; }
  .verdict h1 { font-size: 23px; } .verdict p:first-of-type { font-size: 16px; }
  .keys { grid-template-columns: 1fr 1fr; } .keys dd { font-size: 20px; }
  .keys div { padding: 11px 13px; } h2 { margin-top: 40px; }
  .terms { grid-template-columns: 1fr; gap: 0; } .terms dd { margin-bottom: 8px; } }
@media print { main { max-width: none; padding: 0; } figure, .verdict, tr { break-inside: avoid; }
  h2 { break-after: avoid; } .scroll { overflow: visible; border: 0; } table { font-size: 9px; }
  th, td { padding: 3px 4px; white-space: normal; } details { display: none; } }
""".replace("FONT", FONT)
