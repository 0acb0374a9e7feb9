"""Style and script of an explanation's page; no data."""

STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --rule: #dde2e8; --panel: #f5f7fa; --accent: #1f6feb;
  --canvas: #e9edf2; }
* { box-sizing: border-box; }
html, body { height: 100%; margin: 0; }
body { display: flex; font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: #fff; }
main { position: relative; flex: 1; min-width: 0; background: var(--canvas); }
canvas { display: block; width: 100%; height: 100%; cursor: grab; touch-action: none; outline: none; }
canvas.moving { cursor: grabbing; }
canvas:focus-visible { box-shadow: inset 0 0 0 2px var(--accent); }
#zoom { position: absolute; left: 14px; top: 14px; display: flex; flex-direction: column; gap: 4px; }
button { width: 34px; height: 34px; font-size: 18px; line-height: 1; color: var(--ink); background: #fff;
  border: 1px solid var(--rule); border-radius: 6px; cursor: pointer; }
button:hover { background: var(--panel); }
#place { position: absolute; left: 14px; bottom: 12px; margin: 0; padding: 3px 9px; border-radius: 6px;
  background: rgb(255 255 255 / 0.88); font-size: 12px; font-variant-numeric: tabular-nums; }
#place:empty { display: none; }
aside { width: 300px; flex: none; padding: 20px 20px 12px; border-left: 1px solid var(--rule);
  overflow-y: auto; }
h1 { font-size: 22px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 13px; font-weight: 600; color: var(--soft); margin: 22px 0 6px; }
.file { margin: 2px 0 0; color: var(--soft); overflow-wrap: anywhere; }
ol { list-style: none; margin: 0; padding: 0; }
li { display: grid; grid-template-columns: 1fr 84px 52px; align-items: center; gap: 10px; padding: 2px 0; }
li span { overflow-wrap: anywhere; }
li b { font-weight: 400; text-align: right; font-variant-numeric: tabular-nums; }
li.target span, li.target b { font-weight: 600; }
meter { width: 100%; height: 8px; appearance: none; background: none; border: 0; }
meter::-webkit-meter-bar { height: 8px; background: var(--rule); border: 0; border-radius: 4px; }
meter::-webkit-meter-optimum-value { background: #8a94a6; border-radius: 4px; }
.target meter::-webkit-meter-optimum-value { background: var(--accent); }
.row { display: flex; align-items: center; gap: 8px; padding: 3px 0; }
.row input[type=range] { flex: 1; min-width: 0; }
.row output { width: 42px; text-align: right; font-variant-numeric: tabular-nums; }
input { accent-color: var(--accent); }
.legend { height: 12px; margin-top: 12px; border: 1px solid var(--rule); border-radius: 3px; }
.ends { display: flex; justify-content: space-between; margin: 2px 0 0; font-size: 12px; color: var(--soft); }
dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 14px; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.note { margin: 22px 0 0; padding-top: 12px; border-top: 1px solid var(--rule); font-size: 12px;
  color: var(--soft); }
kbd { font: inherit; padding: 0 4px; border: 1px solid var(--rule); border-radius: 3px; }
@media (max-width: 760px) {
  body { flex-direction: column; }
  main { flex: none; height: 62vh; }
  aside { width: auto; border-left: 0; border-top: 1px solid var(--rule); }
}
"""

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const [image, heat] = data.layers;
const canvas = document.getElementById("view"), context = canvas.getContext("2d");
const control = (id) => document.getElementById(id);
const MOST_KEPT = 600, MOST_ZOOM = 32;
// Screen pixels of a pixel of the image, and the pixel in the middle.
let scale = 1, middle = { x: image.width / 2, y: image.height / 2 }, wanted = false;
const tiles = new Map();

function load(layer, level, col, row) {
  const path = layer.name + "_files/" + level + "/" + col + "_" + row + "." + layer.ending;
  let tile = tiles.get(path);
  if (tile) {
    tiles.delete(path);
  } else {
    tile = new Image();
    tile.onload = draw;
    tile.src = path;
    if (tiles.size >= MOST_KEPT) tiles.delete(tiles.keys().next().value);
  }
  tiles.set(path, tile);
  return tile.complete && tile.naturalWidth ? tile : null;
}
function fit() {
  scale = Math.min(canvas.clientWidth / image.width, canvas.clientHeight / image.height) * 0.96;
  middle = { x: image.width / 2, y: image.height / 2 };
}
function onScreen(x, y) {
  return [(x - middle.x) * scale + canvas.clientWidth / 2, (y - middle.y) * scale + canvas.clientHeight / 2];
}
function inImage(x, y) {
  return [(x - canvas.clientWidth / 2) / scale + middle.x, (y - canvas.clientHeight / 2) / scale + middle.y];
}
// Image pixels of a pixel of a layer's level, across and down.
function steps(layer, level) {
  const factor = 2 ** (layer.last - level);
  return [factor * image.width / layer.width, factor * image.height / layer.height];
}
function levelFor(layer, ratio) {
  const needed = layer.last + Math.ceil(Math.log2(scale * ratio * steps(layer, layer.last)[0]));
  return Math.max(0, Math.min(layer.last, needed));
}
function drawLayer(layer, opacity, ratio) {
  const level = levelFor(layer, ratio), [stepX, stepY] = steps(layer, level), size = data.tile;
  const [left, top] = inImage(0, 0), [right, bottom] = inImage(canvas.clientWidth, canvas.clientHeight);
  const last = (extent, step) => Math.ceil(extent / step / size) - 1;
  const cols = [Math.max(0, Math.floor(left / stepX / size)),
    Math.min(last(image.width, stepX), Math.floor(right / stepX / size))];
  const rows = [Math.max(0, Math.floor(top / stepY / size)),
    Math.min(last(image.height, stepY), Math.floor(bottom / stepY / size))];
  context.globalAlpha = opacity;
  context.imageSmoothingEnabled = scale * ratio * stepX < 4 || layer.width < image.width;
  context.imageSmoothingQuality = "high";
  for (let row = rows[0]; row <= rows[1]; row++)
    for (let col = cols[0]; col <= cols[1]; col++) drawTile(layer, level, col, row, ratio);
}
// A tile, or as long as it is not there the part of the next coarser one that is.
function drawTile(layer, level, col, row, ratio) {
  const size = data.tile, [stepX, stepY] = steps(layer, level);
  for (let up = 0; up <= level; up++) {
    const tile = load(layer, level - up, col >> up, row >> up);
    if (!tile) continue;
    const part = size / 2 ** up, x = (col % 2 ** up) * part, y = (row % 2 ** up) * part;
    const width = Math.min(part, tile.naturalWidth - x), height = Math.min(part, tile.naturalHeight - y);
    if (width <= 0 || height <= 0) return;
    const [left, top] = onScreen(col * size * stepX, row * size * stepY).map((v) => Math.round(v * ratio));
    const [right, bottom] = onScreen((col * size + width * 2 ** up) * stepX,
      (row * size + height * 2 ** up) * stepY).map((v) => Math.round(v * ratio));
    context.drawImage(tile, x, y, width, height, left, top, right - left, bottom - top);
    return;
  }
}
function drawGrid(ratio) {
  const [left, top] = onScreen(0, 0), [right, bottom] = onScreen(image.width, image.height);
  const path = new Path2D(), sharp = (v) => Math.round(v * ratio) + 0.5;
  for (const x of data.grid.cols.map((col) => onScreen(col, 0)[0])) {
    path.moveTo(sharp(x), top * ratio);
    path.lineTo(sharp(x), bottom * ratio);
  }
  for (const y of data.grid.rows.map((row) => onScreen(0, row)[1])) {
    path.moveTo(left * ratio, sharp(y));
    path.lineTo(right * ratio, sharp(y));
  }
  context.globalAlpha = 1;
  for (const [color, width] of [["rgb(255 255 255 / 0.75)", 3], ["rgb(28 36 48 / 0.9)", 1]]) {
    context.strokeStyle = color;
    context.lineWidth = width * Math.max(1, Math.round(ratio));
    context.stroke(path);
  }
}
function paint() {
  wanted = false;
  const ratio = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  context.clearRect(0, 0, width, height);
  context.save();
  const [left, top] = onScreen(0, 0), [right, bottom] = onScreen(image.width, image.height);
  context.beginPath();
  context.rect(left * ratio, top * ratio, (right - left) * ratio, (bottom - top) * ratio);
  context.clip();
  drawLayer(image, 1, ratio);
  if (control("heat").checked) drawLayer(heat, control("opacity").value / 100, ratio);
  if (control("grid").checked) drawGrid(ratio);
  context.restore();
  const loaded = [...tiles.values()].filter((tile) => tile.complete && tile.naturalWidth).length;
  document.body.dataset.tiles = loaded + " of " + tiles.size;
}
function draw() {
  if (!wanted) requestAnimationFrame(paint);
  wanted = true;
}
function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
  const [atX, atY] = inImage(x, y);
  const least = Math.min(canvas.clientWidth / image.width, canvas.clientHeight / image.height) / 2;
  const before = scale;
  scale = Math.min(MOST_ZOOM, Math.max(Math.min(least, 1), scale * factor));
  middle = { x: atX + (middle.x - atX) * before / scale, y: atY + (middle.y - atY) * before / scale };
  draw();
}
function move(x, y) {
  middle.x = Math.min(image.width, Math.max(0, middle.x - x / scale));
  middle.y = Math.min(image.height, Math.max(0, middle.y - y / scale));
  draw();
}
function keepPlace() {
  history.replaceState(null, "",
    "#" + [Math.round(middle.x), Math.round(middle.y), scale.toPrecision(4)].join(","));
}
function takePlace() {
  const [x, y, s] = location.hash.slice(1).split(",").map(Number);
  if (x >= 0 && y >= 0 && s > 0) { middle = { x, y }; scale = s; } else fit();
}
const fingers = new Map();
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, event);
  canvas.classList.add("moving");
});
canvas.addEventListener("pointermove", (event) => {
  const [col, row] = inImage(event.offsetX, event.offsetY).map(Math.floor);
  const inside = col >= 0 && row >= 0 && col < image.width && row < image.height;
  control("place").textContent = inside ? "column " + col + ", row " + row : "";
  const before = fingers.get(event.pointerId);
  if (!before) return;
  const other = [...fingers.values()].find((finger) => finger.pointerId !== event.pointerId);
  if (other) {
    const apart = (one) => Math.hypot(one.offsetX - other.offsetX, one.offsetY - other.offsetY);
    const [x, y] = ["offsetX", "offsetY"].map((axis) => (event[axis] + other[axis]) / 2);
    zoom(apart(event) / apart(before), x, y);
  } else {
    move(event.offsetX - before.offsetX, event.offsetY - before.offsetY);
  }
  fingers.set(event.pointerId, event);
});
for (const name of ["pointerup", "pointercancel"])
  canvas.addEventListener(name, (event) => {
    fingers.delete(event.pointerId);
    if (!fingers.size) canvas.classList.remove("moving");
    keepPlace();
  });
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.offsetX, event.offsetY);
  keepPlace();
}, { passive: false });
canvas.addEventListener("dblclick", (event) => zoom(2, event.offsetX, event.offsetY));
const actions = {
  "+": () => zoom(2), "=": () => zoom(2), "-": () => zoom(0.5), "0": () => { fit(); draw(); },
  ArrowLeft: () => move(80, 0), ArrowRight: () => move(-80, 0),
  ArrowUp: () => move(0, 80), ArrowDown: () => move(0, -80),
  h: () => control("heat").click(), t: () => control("grid").click(),
};
window.addEventListener("keydown", (event) => {
  if (event.target.type === "range" || event.ctrlKey || event.metaKey || event.altKey) return;
  const action = actions[event.key];
  if (!action) return;
  event.preventDefault();
  action();
  keepPlace();
});
for (const button of document.querySelectorAll("[data-zoom]"))
  button.addEventListener("click", () => {
    if (Number(button.dataset.zoom)) zoom(Number(button.dataset.zoom)); else { fit(); draw(); }
    keepPlace();
  });
control("opacity").addEventListener("input", () => {
  control("percent").textContent = control("opacity").value + "%";
  draw();
});
for (const id of ["heat", "grid"]) control(id).addEventListener("change", draw);
new ResizeObserver(draw).observe(canvas);
window.addEventListener("hashchange", () => { takePlace(); draw(); });
takePlace();
draw();
"""
