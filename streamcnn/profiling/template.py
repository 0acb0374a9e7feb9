"""Style and script of a profile's page; no data."""

STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --rule: #dde2e8; --panel: #f5f7fa; --pick: #e3eefc;
  --measured: #1f6feb; --projected: #8a94a6; --budget: #c62828; --plain: #7b3fb5; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 1240px;
  margin: 24px auto; padding: 0 20px; }
h1 { font-size: 22px; margin: 0; }
.headline { font-size: 17px; margin: 4px 0 18px; }
.top { display: flex; flex-wrap: wrap; gap: 12px 20px; align-items: flex-start; }
figure { flex: 4 1 290px; min-width: 0; margin: 0; }
figure.wide { flex: 6 1 430px; }
figcaption { font-weight: 600; }
.key, .swatch { font-weight: 400; margin-left: 14px; white-space: nowrap; font-size: 13px; }
.key::before { content: ""; display: inline-block; width: 18px; margin-right: 6px; vertical-align: 4px;
  border-top: 3px solid var(--measured); }
.key.projected::before { border-top: 3px dashed var(--projected); }
.swatch::before { content: ""; display: inline-block; width: 11px; height: 11px; margin-right: 6px;
  vertical-align: -1px; background: var(--swatch); }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, sans-serif; }
.top svg text, svg.timeline text { font-size: 12px; fill: var(--soft); }
.grid { stroke: var(--rule); }
.limit { stroke-width: 2; }
.limit.budget { stroke: var(--budget); }
.limit.plain { stroke: var(--plain); stroke-dasharray: 2 4; }
.limit.projected { stroke: var(--projected); stroke-dasharray: 6 5; }
svg .limit-label { font-weight: 600; paint-order: stroke; stroke: #fff; stroke-width: 3px; }
.top svg .limit-label.budget, svg.timeline .limit-label.budget { fill: var(--budget); }
.top svg .limit-label.plain { fill: var(--plain); }
.line { fill: none; stroke-width: 2.5; }
.line.measured { stroke: var(--measured); }
.line.projected { stroke: var(--projected); stroke-dasharray: 6 5; }
.mark { stroke-width: 2.5; }
.mark.measured { fill: var(--measured); stroke: #fff; }
.mark.projected { fill: #fff; stroke: var(--projected); }
svg .value { font-weight: 600; paint-order: stroke; stroke: #fff; stroke-width: 3px; }
.top svg .beyond { font-weight: 600; fill: var(--budget); }
.point { cursor: pointer; outline: none; }
.point.refused .mark { stroke: var(--budget); }
.target { fill: transparent; }
.guide { stroke: none; }
.point.active .guide { stroke: var(--measured); stroke-dasharray: 3 3; }
.point.active .mark { r: 8px; }
.point:focus-visible .target { stroke: var(--measured); stroke-width: 2; }
#detail { flex: 3 1 230px; box-sizing: border-box; background: var(--panel); border: 1px solid var(--rule);
  border-radius: 8px; padding: 14px 18px; margin-top: 26px; }
#detail h2 { font-size: 17px; margin: 0 0 8px; }
#detail dl { display: grid; grid-template-columns: auto auto; gap: 3px 12px; margin: 0; }
#detail dt { color: var(--soft); }
#detail dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; font-weight: 600; }
#detail p { font-size: 13px; color: var(--soft); margin: 10px 0 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; table-layout: fixed; width: 100%; margin-top: 10px;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--rule); }
thead th { color: var(--soft); font-weight: 600; }
tbody tr { cursor: pointer; }
tbody tr.refused td { color: var(--soft); }
tbody tr.refused td:last-child { color: var(--budget); font-weight: 600; }
tbody tr.active { background: var(--pick); }
tbody tr:focus-visible { outline: 2px solid var(--measured); outline-offset: -2px; }
.panel { margin-top: 28px; }
.area { stroke: #fff; stroke-width: 0.4; }
.peak { fill: none; stroke: var(--ink); stroke-width: 2; }
svg.timeline .peak-label { fill: var(--ink); font-weight: 600; paint-order: stroke; stroke: #fff;
  stroke-width: 3px; }
svg.timeline .direction { font-weight: 600; fill: var(--ink); }
.cursor { visibility: hidden; stroke: var(--ink); fill: var(--ink); }
.pointed .cursor { visibility: visible; }
.info { font-size: 13px; color: var(--soft); margin: 4px 0 0; min-height: 1.6em; }
.plan .info { min-height: 3.2em; }
.absent { background: var(--panel); color: var(--soft); padding: 24px; margin: 8px 0 0; }
.scroll { overflow-x: auto; }
.plan .scroll { border-bottom: 1px solid var(--rule); padding-bottom: 4px; }
.plan .scroll svg { width: auto; max-width: none; }
.column { outline: none; }
.column:hover > rect:first-child, .column:focus > rect:first-child { fill: var(--pick); }
.note { font-size: 13px; color: var(--soft); border-top: 1px solid var(--rule); padding-top: 12px;
  margin-top: 28px; }
summary { cursor: pointer; }
pre { background: var(--panel); padding: 12px; overflow-x: auto; font-size: 12px; }
@media (max-width: 1060px) {
  #detail { margin-top: 0; }
  #detail dl { grid-template-columns: repeat(3, auto auto); }
  #detail dd { text-align: left; }
  svg.timeline text { font-size: 17px; }
  table { table-layout: auto; }
}
@media (max-width: 640px) {
  #detail dl { grid-template-columns: auto auto; }
  #detail dd { text-align: right; }
  .wide svg text { font-size: 15px; }
  svg.timeline { min-width: 800px; }
  th, td { white-space: nowrap; padding: 5px 8px; }
}
@media print {
  body { margin: 0; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure, table { break-inside: avoid; }
  .scroll { overflow: visible; }
  .plan .scroll svg { width: 100%; height: auto; }
  .info, details { display: none; }
}
"""

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("profiles").textContent);
const detail = document.getElementById("detail");
const items = document.querySelectorAll("[data-tile]");
const panels = document.querySelectorAll("[data-of]");
let kept = data.selected;
function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}
function show(tile) {
  const shown = data.tiles[tile];
  for (const item of items) item.classList.toggle("active", item.dataset.tile === String(tile));
  for (const panel of panels) panel.hidden = panel.dataset.of !== String(tile);
  detail.querySelector("h2").textContent = "Tile " + tile + " pixels";
  detail.querySelector("dl").replaceChildren(
    ...shown.values.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
  detail.querySelector("p").textContent = shown.note;
}
function keep(tile) {
  if (!data.tiles[tile]) return;
  kept = tile;
  show(tile);
}
function keepFromAddress() {
  const match = /^#tile=([0-9]+)$/.exec(location.hash);
  if (match) keep(match[1]);
}
function indexAt(moments, moment) {
  let low = 0, high = moments.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (moments[middle] <= moment) low = middle; else high = middle - 1;
  }
  const next = Math.min(low + 1, moments.length - 1);
  return moments[next] - moment < moment - moments[low] ? next : low;
}
function follow(svg, event) {
  const scale = JSON.parse(svg.dataset.scale), panel = svg.closest("[data-of]");
  const line = data.tiles[panel.dataset.of].timeline, frame = svg.getBoundingClientRect();
  const across = (event.clientX - frame.left) / frame.width * svg.viewBox.baseVal.width;
  const share = Math.min(1, Math.max(0, (across - scale.left) / (scale.right - scale.left)));
  const index = indexAt(line.seconds, share * scale.seconds);
  const x = scale.left + line.seconds[index] / scale.seconds * (scale.right - scale.left);
  const height = Math.min(1, Math.max(0, line.nbytes[index]) / scale.nbytes);
  const [cursor, dot] = svg.querySelectorAll(".cursor");
  for (const end of ["x1", "x2"]) cursor.setAttribute(end, x);
  dot.setAttribute("cx", x);
  dot.setAttribute("cy", scale.bottom - height * (scale.bottom - scale.top));
  svg.classList.add("pointed");
  panel.querySelector(".info").textContent = line.seconds[index].toFixed(3) + " s: " + line.words[index]
    + " in " + line.labels[line.running[index]];
}
for (const item of items) {
  item.addEventListener("mouseenter", () => show(item.dataset.tile));
  item.addEventListener("mouseleave", () => show(kept));
  for (const event of ["focus", "click"]) item.addEventListener(event, () => keep(item.dataset.tile));
}
for (const svg of document.querySelectorAll("svg.timeline")) {
  const info = svg.closest("[data-of]").querySelector(".info");
  svg.addEventListener("mousemove", (event) => follow(svg, event));
  svg.addEventListener("mouseleave", () => {
    svg.classList.remove("pointed");
    info.textContent = data.hints[0];
  });
}
for (const column of document.querySelectorAll("[data-info]")) {
  const info = column.closest("[data-of]").querySelector(".info");
  for (const event of ["mouseenter", "focus"])
    column.addEventListener(event, () => { info.textContent = column.dataset.info; });
  for (const event of ["mouseleave", "blur"])
    column.addEventListener(event, () => { info.textContent = data.hints[1]; });
}
window.addEventListener("hashchange", keepFromAddress);
show(kept);
keepFromAddress();
document.body.dataset.points = document.querySelectorAll("svg .point").length;
"""
