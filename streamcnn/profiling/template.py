"""Style and script of a profile's page; no data."""

STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --rule: #dde2e8; --panel: #f5f7fa; --pick: #e3eefc;
  --measured: #1f6feb; --projected: #8a94a6; --budget: #c62828; --plain: #7b3fb5; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 1080px; margin: 24px auto;
  padding: 0 20px; }
h1 { font-size: 22px; margin: 0; }
.headline { font-size: 17px; margin: 4px 0 16px; }
.top { display: flex; flex-wrap: wrap; gap: 20px; align-items: stretch; }
figure { flex: 1 1 560px; margin: 0; }
figcaption { font-weight: 600; }
.key { font-weight: 400; margin-left: 14px; }
.key::before { content: ""; display: inline-block; width: 18px; margin-right: 6px; vertical-align: 4px;
  border-top: 3px solid var(--measured); }
.key.projected::before { border-top: 3px dashed var(--projected); }
svg { width: 100%; height: auto; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.grid { stroke: var(--rule); }
.limit { stroke-width: 2; }
.limit.budget { stroke: var(--budget); }
.limit.plain { stroke: var(--plain); stroke-dasharray: 2 4; }
svg .limit-label { font-weight: 600; paint-order: stroke; stroke: #fff; stroke-width: 3px; }
svg .limit-label.budget { fill: var(--budget); }
svg .limit-label.plain { fill: var(--plain); }
.line { fill: none; stroke-width: 2.5; }
.line.measured { stroke: var(--measured); }
.line.projected { stroke: var(--projected); stroke-dasharray: 6 5; }
.mark { stroke-width: 2.5; }
.mark.measured { fill: var(--measured); stroke: #fff; }
.mark.projected { fill: #fff; stroke: var(--projected); }
svg .beyond { font-weight: 600; fill: var(--budget); }
.point { cursor: pointer; outline: none; }
.point.refused .mark { stroke: var(--budget); }
.target { fill: transparent; }
.guide { stroke: none; }
.point.active .guide { stroke: var(--measured); stroke-dasharray: 3 3; }
.point.active .mark { r: 8px; }
.point:focus-visible .target { stroke: var(--measured); stroke-width: 2; }
#detail { flex: 0 1 300px; box-sizing: border-box; background: var(--panel); border: 1px solid var(--rule);
  border-radius: 8px; padding: 14px 18px; }
#detail h2 { font-size: 17px; margin: 0 0 8px; }
#detail dl { display: grid; grid-template-columns: auto auto; gap: 3px 12px; margin: 0; }
#detail dt { color: var(--soft); }
#detail dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; font-weight: 600; }
#detail p { font-size: 13px; color: var(--soft); margin: 10px 0 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; margin-top: 18px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--rule); }
thead th { color: var(--soft); font-weight: 600; }
tbody tr { cursor: pointer; }
tbody tr.refused td { color: var(--soft); }
tbody tr.refused td:last-child { color: var(--budget); font-weight: 600; }
tbody tr.active { background: var(--pick); }
tbody tr:focus-visible { outline: 2px solid var(--measured); outline-offset: -2px; }
.note { font-size: 13px; color: var(--soft); }
details { margin: 6px 0; }
summary { cursor: pointer; }
pre { background: var(--panel); padding: 12px; overflow-x: auto; font-size: 12px; }
"""

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("profiles").textContent);
const detail = document.getElementById("detail");
const items = document.querySelectorAll("[data-tile]");
function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}
function select(tile) {
  const shown = data.tiles[tile];
  if (!shown) return;
  for (const item of items) item.classList.toggle("active", item.dataset.tile === String(tile));
  detail.dataset.selected = tile;
  detail.querySelector("h2").textContent = "Tile " + tile + " pixels";
  detail.querySelector("dl").replaceChildren(
    ...shown.values.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
  detail.querySelector("p").textContent = shown.note;
}
function selectFromAddress() {
  const match = /^#tile=([0-9]+)$/.exec(location.hash);
  if (match) select(match[1]);
}
for (const item of items)
  for (const event of ["mouseenter", "focus", "click"])
    item.addEventListener(event, () => select(item.dataset.tile));
window.addEventListener("hashchange", selectFromAddress);
select(data.selected);
selectFromAddress();
document.body.dataset.points = document.querySelectorAll("svg .point").length;
"""
