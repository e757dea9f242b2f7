"use strict";
// A map is a picture whose grey level v counts hundredths of the threshold: what is above level k is v > k.
const byId = (id) => document.getElementById(id);
const scale = JSON.parse(byId("scale").textContent);
const mapThreshold = Number(byId("scale").dataset.threshold);
const gallery = byId("gallery"), viewer = byId("viewer");
const cases = [...gallery.children];
const loaded = new Map();  // of each case, the promise of its map and mask
const page = 24;  // cases shown before one asks for more
let matches = [];  // the cases that the filters let through, in their order
let shown = page;  // how many of them at most
let current = null;  // the case in the viewer

// The grey levels of a picture.
async function levels(source) {
  const picture = new Image();
  picture.src = source;
  await picture.decode();
  const [width, height] = [picture.naturalWidth, picture.naturalHeight];
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  const values = context.getImageData(0, 0, width, height).data.filter((_, i) => i % 4 === 0);
  return { values, width, height };
}

function load(item) {
  if (!loaded.has(item)) {
    const { map, mask } = item.querySelector("canvas").dataset;
    loaded.set(item, Promise.all([levels(map), mask ? levels(mask) : null]));
  }
  return loaded.get(item);
}

// The pixels just outside a region, as far as a line is wide.
function outline(region, width, height) {
  let grown = region;
  const times = Math.max(1, Math.round(Math.min(width, height) / scale.outlines.side));
  for (let time = 0; time < times; time++) {
    const last = grown;
    grown = last.map((value, i) => value || last[i - width] || last[i + width]
      || (i % width && last[i - 1]) || ((i + 1) % width && last[i + 1]) || 0);
  }
  return grown.map((value, i) => value && !region[i]);
}

// Draw heat colours and lines; the share of pixels above the level.
function paint(canvas, [map, mask], { opacity, level, lineAbove, lineTruth }) {
  const { values, width, height } = map;
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d"), picture = context.createImageData(width, height);
  const pixels = new Uint32Array(picture.data.buffer);
  const colour = ([red, green, blue], alpha) => ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0;
  const heat = scale.colours.map((own, v) => colour(own, Math.round(255 * opacity * scale.fade[v])));
  values.forEach((v, i) => { pixels[i] = heat[v]; });
  const above = values.map((v) => v > level ? 1 : 0);
  const draw = (region, own) => outline(region, width, height).forEach((on, i) => { if (on) pixels[i] = colour(own, 255); });
  if (lineAbove) draw(above, scale.outlines.above);
  if (lineTruth && mask) draw(mask.values.map((v) => v ? 1 : 0), scale.outlines.mask);
  context.putImageData(picture, 0, 0);
  return above.reduce((sum, v) => sum + v, 0) / above.length;
}

const usual = { opacity: Number(byId("opacity").value) / 100, level: scale.steps, lineAbove: true, lineTruth: false };
const seen = new IntersectionObserver((entries) => entries.filter((entry) => entry.isIntersecting).forEach(async (entry) => {
  seen.unobserve(entry.target);
  paint(entry.target.querySelector("canvas"), await load(entry.target), usual);
}), { rootMargin: "300px" });
cases.forEach((item) => seen.observe(item));

function arrange() {
  const [type, verdict, order] = ["type", "verdict", "order"].map((id) => byId(id).value);
  const key = { fall: (own) => -own.score, rise: (own) => Number(own.score), wrong: (own) => -own.wrong }[order];
  gallery.append(...[...cases].sort((a, b) => key(a.dataset) - key(b.dataset)));
  matches = [...gallery.children].filter(({ dataset: own }) =>
    (!type || own.type === type) && (!verdict || own.verdict === verdict || own.kind === verdict));
  cases.forEach((item) => { item.hidden = true; });
  matches.slice(0, shown).forEach((item) => { item.hidden = false; });
  byId("count").textContent = `${matches.length} of ${cases.length} images`;
  byId("more").hidden = matches.length <= shown;
  byId("more").textContent = `Show ${matches.length - shown} more`;
}

async function refresh() {
  const item = current, level = Number(byId("level").value), opacity = Number(byId("opacity").value) / 100;
  const maps = await load(item);
  if (item !== current) return;
  const share = paint(byId("viewer-map"), maps,
    { opacity, level, lineAbove: byId("line-above").checked, lineTruth: byId("line-truth").checked });
  byId("opacity-value").textContent = `${Math.round(100 * opacity)}%`;
  byId("level-value").textContent = `${(level / scale.steps).toFixed(2)} × ${mapThreshold.toPrecision(4)}`;
  byId("above").textContent = `${(100 * share).toFixed(2)}% of the image is above`;
}

function show(item) {
  const own = item.dataset, photograph = item.querySelector("img");
  current = item;
  byId("viewer-title").textContent = `${own.kind === "right" ? "✓" : "✗"} ${own.verdict} · ${own.type} · score ${Number(own.score).toPrecision(4)}`;
  byId("viewer-title").className = own.kind;
  byId("viewer-key").textContent = own.key;
  byId("viewer-image").src = photograph.src;
  byId("viewer-image").alt = photograph.alt;
  byId("truth").textContent = own.truth;
  byId("previous").disabled = item === matches[0];
  byId("next").disabled = item === matches.at(-1);
  if (!viewer.open) viewer.showModal();
  refresh();
}

function step(by) {
  const item = matches[matches.indexOf(current) + by];
  if (item) show(item);
}

function reset() {
  viewer.querySelectorAll("input").forEach((input) => {
    input.value = input.defaultValue;
    input.checked = input.defaultChecked;
  });
  refresh();
}

byId("controls").addEventListener("input", () => { shown = page; arrange(); });
byId("more").addEventListener("click", () => {
  const first = matches[shown];
  shown = Infinity;
  arrange();
  first.querySelector("button").focus();
});
gallery.addEventListener("click", (event) => {
  const item = event.target.closest(".case");
  if (item) show(item);
});
viewer.addEventListener("input", refresh);
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("reset").addEventListener("click", reset);
byId("close").addEventListener("click", () => viewer.close());
viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
viewer.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by && event.target.type !== "range") step(by);
});
viewer.addEventListener("close", () => current?.querySelector("button").focus());
arrange();
