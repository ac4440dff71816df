"use strict";
// Charts as SVG, drawn again when their width changes. Colours are variables of the style sheet, so both themes work.

const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg"; // the name of a namespace, nothing is loaded from there
const COLOURS = 10, HEIGHT = 230, PAD = { left: 58, right: 14, top: 10, bottom: 34 };
const MARKED_POINTS = 40, SMOOTHED_POINTS = 60, MOST_COLUMNS = 120, DECADES = 1e4;

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "class") node.className = value;
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function draw(parent, tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

const colour = (index) => `var(--c${index % COLOURS})`;

function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "-";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("e-", "e−").replace("e+", "e");
  if (size >= 1000) return value.toLocaleString("en-US", { maximumFractionDigits: 0 });
  return String(+value.toPrecision(4)).replace("-", "−");
}

const percent = (value) => (value === null || value === undefined ? "-" : `${+(100 * value).toPrecision(4)} %`);
const formOf = (spec) => (spec.percent ? percent : number);

// ---- the box beside the pointer, shared by charts and tokens

const tip = make("div", { id: "tip", role: "tooltip", hidden: true });
document.body.append(tip);

function showTip(content, x, y) {
  tip.replaceChildren(content);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = x + 14 + box.width > innerWidth ? x - 14 - box.width : x + 14;
  const top = y + 18 + box.height > innerHeight ? y - 12 - box.height : y + 18;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}

const hideTip = () => { tip.hidden = true; };

function tipTable(title, rows) {
  const table = make("table");
  for (const [name, value, fill] of rows) {
    const label = make("td", {}, name);
    if (fill) {
      const mark = make("i");
      mark.style.background = fill;
      label.prepend(mark);
    }
    table.append(make("tr", {}, label, make("td", {}, value)));
  }
  return make("div", {}, make("strong", {}, title), table);
}

// ---- scales and axes

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(+(i * step).toPrecision(12));
  return found;
}

function linear(low, high, from, to) {
  const scale = (value) => from + ((value - low) / (high - low)) * (to - from);
  return Object.assign(scale, { low, high, ticks: (count) => ticks(low, high, count) });
}

function logarithmic(low, high, from, to) {
  const inner = linear(Math.log10(low), Math.log10(high), from, to);
  const scale = (value) => inner(Math.log10(value));
  scale.ticks = () => {
    const found = [];
    const marks = high / low > 1000 ? [1] : high / low > 30 ? [1, 3] : [1, 2, 5];
    for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++)
      for (const m of marks) if (m * 10 ** p >= low * 0.999 && m * 10 ** p <= high * 1.001) found.push(m * 10 ** p);
    return found;
  };
  return scale;
}

function valueScale(values, spec, from, to) {
  let low = Math.min(...values), high = Math.max(...values);
  if (spec.log && low > 0) low = Math.max(low, high / DECADES); // smaller values lie on the axis
  if (spec.log && low > 0) return high > low * 1.5 ? logarithmic(low / 1.15, high * 1.15, from, to) : logarithmic(low / 2, high * 2, from, to);
  if (spec.zero) low = Math.min(0, low);
  if (high === low) { const room = Math.abs(high) * 0.1 || 1; high += room; if (!spec.zero || low !== 0) low -= room; }
  const room = (high - low) * 0.06;
  return linear(spec.zero && low === 0 ? 0 : low - room, high + room, from, to);
}

function tickText(value, spec) {
  if (spec.percent) return `${+(100 * value).toPrecision(4)} %`;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(0).replace("e-", "e−").replace("e+", "e");
  return String(+value.toPrecision(5)).replace("-", "−");
}

function frame(svg, width, x, y, spec) {
  const bottom = HEIGHT - PAD.bottom;
  for (const value of y.ticks(5)) {
    draw(svg, "line", { x1: PAD.left, x2: width - PAD.right, y1: y(value), y2: y(value), stroke: "var(--grid)" });
    draw(svg, "text", { x: PAD.left - 7, y: y(value) + 4, "text-anchor": "end" }, tickText(value, spec));
  }
  const labels = spec.labels;
  const marks = labels ? labels.map((_, i) => i) : x.ticks(Math.max(2, Math.min(8, width / 80))).filter(Number.isInteger);
  for (const value of marks) draw(svg, "text", { x: x(value), y: bottom + 17, "text-anchor": "middle" }, labels ? firstOf(labels[value]) : value);
  draw(svg, "line", { x1: PAD.left, x2: width - PAD.right, y1: bottom, y2: bottom, stroke: "var(--line)" });
  draw(svg, "text", { x: width - PAD.right, y: HEIGHT - 2, "text-anchor": "end" }, spec.xName || "step");
}

// Of a bin such as "4–7", because whole bins do not fit beside one another.
const firstOf = (label) => label.split("–")[0];

function stepScale(low, high, width, margin) {
  return linear(low - margin, high === low ? high + Math.max(margin, 0.5) : high + margin, PAD.left, width - PAD.right);
}

// ---- kinds of charts. Each function draws once and returns {xs, place, tell}: where the pointer can stop, and what it is told there.

function movingAverage(values) {
  const half = Math.max(3, Math.floor(values.length / 20) | 1) >> 1;
  return values.map((_, i) => {
    const part = values.slice(Math.max(0, i - half), i + half + 1);
    return part.reduce((a, b) => a + b, 0) / part.length;
  });
}

function lines(svg, width, spec) {
  const points = spec.series.flatMap((s) => s.x);
  const x = stepScale(Math.min(...points), Math.max(...points), width, spec.labels ? 0.3 : 0);
  const values = spec.series.flatMap((s) => s.y.flatMap((v, i) => (s.error && s.error[i] ? [v - s.error[i], v + s.error[i]] : [v])));
  const shown = spec.log ? values.filter((v) => v > 0) : values;
  const scale = valueScale((shown.length ? shown : [0, 1]).concat(spec.reference !== undefined ? [spec.reference] : []), spec, HEIGHT - PAD.bottom, PAD.top);
  const y = Object.assign((value) => Math.min(scale(value), HEIGHT - PAD.bottom), { ticks: scale.ticks });
  frame(svg, width, x, y, spec);
  if (spec.reference !== undefined)
    draw(svg, "line", { x1: PAD.left, x2: width - PAD.right, y1: y(spec.reference), y2: y(spec.reference), stroke: "var(--soft)", "stroke-dasharray": "5 4" });
  spec.series.forEach((series, n) => {
    const usable = series.x.map((_, i) => i).filter((i) => !spec.log || series.y[i] > 0);
    const at = (ys) => usable.map((i) => `${x(series.x[i]).toFixed(1)},${y(ys[i]).toFixed(1)}`).join(" ");
    if (series.error && series.error.some((e) => e)) {
      const up = usable.map((i) => `${x(series.x[i])},${y(series.y[i] + (series.error[i] || 0))}`);
      const down = usable.map((i) => `${x(series.x[i])},${y(series.y[i] - (series.error[i] || 0))}`).reverse();
      draw(svg, "polygon", { points: [...up, ...down].join(" "), fill: colour(n), opacity: 0.18 });
      if (usable.length === 1)
        for (const i of usable)
          draw(svg, "line", { x1: x(series.x[i]), x2: x(series.x[i]), y1: y(series.y[i] - series.error[i]), y2: y(series.y[i] + series.error[i]), stroke: colour(n), "stroke-width": 2 });
    }
    const many = usable.length >= SMOOTHED_POINTS;
    draw(svg, "polyline", { points: at(series.y), fill: "none", stroke: colour(n), "stroke-width": many ? 1 : 2, opacity: many ? 0.35 : 1, "stroke-linejoin": "round" });
    if (many) draw(svg, "polyline", { points: at(movingAverage(series.y)), fill: "none", stroke: colour(n), "stroke-width": 2.2, "stroke-linejoin": "round" });
    if (usable.length <= MARKED_POINTS)
      for (const i of usable) draw(svg, "circle", { cx: x(series.x[i]), cy: y(series.y[i]), r: 3, fill: colour(n) });
  });
  const xs = [...new Set(points)].sort((a, b) => a - b), form = formOf(spec);
  return {
    xs,
    place: (value) => ({ x: x(value), dots: spec.series.flatMap((s, n) => {
      const i = s.x.indexOf(value);
      return i < 0 || (spec.log && s.y[i] <= 0) ? [] : [[y(s.y[i]), colour(n)]];
    }) }),
    tell: (value) => tipTable(spec.labels ? `token ${spec.labels[value]}` : `step ${value}`, spec.series.flatMap((s, n) => {
      const i = s.x.indexOf(value);
      return i < 0 ? [] : [[s.name, form(s.y[i]) + (s.error && s.error[i] ? ` ± ${form(s.error[i])}` : ""), colour(n)]];
    })),
  };
}

function columnsOf(steps) {
  const size = Math.ceil(steps.length / MOST_COLUMNS), bins = [];
  for (let i = 0; i < steps.length; i += size) bins.push([i, Math.min(i + size, steps.length)]);
  return bins;
}

const stepsText = (steps, [from, to]) => (to - from === 1 ? `step ${steps[from]}` : `steps ${steps[from]} to ${steps[to - 1]}`);
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

function stack(svg, width, spec) {
  const bins = columnsOf(spec.steps), last = bins.length - 1;
  const sums = spec.series.map((s) => bins.map(([from, to]) => mean(s.y.slice(from, to).map((v) => v || 0))));
  const totals = bins.map((_, b) => sums.reduce((total, s) => total + s[b], 0));
  const x = linear(0, bins.length, PAD.left, width - PAD.right);
  const y = valueScale([0, ...totals], { zero: true }, HEIGHT - PAD.bottom, PAD.top);
  frame(svg, width, { ticks: () => [] }, y, spec);
  const every = Math.ceil(bins.length / Math.max(2, Math.min(8, width / 80)));
  bins.forEach(([from], b) => {
    if (b % every === 0) draw(svg, "text", { x: x(b + 0.5), y: HEIGHT - PAD.bottom + 17, "text-anchor": "middle" }, spec.steps[from]);
    let base = 0;
    sums.forEach((s, n) => {
      const top = base + s[b], gap = bins.length > 60 ? 0 : Math.min(3, (x(1) - x(0)) * 0.12);
      if (s[b] > 0) draw(svg, "rect", { x: x(b) + gap / 2, width: Math.max(0.5, x(1) - x(0) - gap), y: y(top), height: Math.max(0, y(base) - y(top)), fill: colour(n), "shape-rendering": gap ? "auto" : "crispEdges" });
      base = top;
    });
  });
  return {
    xs: bins.map((_, b) => b),
    place: (b) => ({ x: x(Math.min(b, last) + 0.5), dots: [] }),
    tell: (b) => tipTable(stepsText(spec.steps, bins[b]), [
      ...spec.series.map((s, n) => [s.name, `${number(sums[n][b])} s`, colour(n)]).reverse(),
      ["together", `${number(totals[b])} s`],
    ]),
  };
}

// The colours of matplotlib's cividis, which look the same to colour-blind readers.
const RAMP = [[0, 34, 78], [53, 69, 108], [102, 105, 112], [148, 142, 119], [200, 184, 102], [254, 232, 56]];

function ramp(share) {
  const at = Math.max(0, Math.min(1, share)) * (RAMP.length - 1), i = Math.min(RAMP.length - 2, Math.floor(at));
  return `rgb(${RAMP[i].map((v, k) => Math.round(v + (RAMP[i + 1][k] - v) * (at - i))).join(",")})`;
}

function heat(svg, width, spec) {
  const bins = columnsOf(spec.steps), rows = spec.labels.length;
  const cells = bins.map(([from, to]) => spec.labels.map((_, r) => {
    const found = spec.values.slice(from, to).map((v) => v[r]).filter((v) => v !== undefined && v !== null);
    return found.length ? mean(found) : null;
  }));
  const x = linear(0, bins.length, PAD.left, width - PAD.right), y = linear(0, rows, HEIGHT - PAD.bottom, PAD.top);
  const [low, high] = spec.range, share = (v) => (v <= low || high <= low ? 0 : Math.log(v / low) / Math.log(high / low));
  cells.forEach((column, b) => column.forEach((value, r) => {
    if (value !== null) draw(svg, "rect", { x: x(b), width: x(1) - x(0) + 0.4, y: y(r + 1), height: y(0) - y(1) + 0.4, fill: ramp(share(value)), "shape-rendering": "crispEdges" });
  }));
  spec.labels.forEach((label, r) => draw(svg, "text", { x: PAD.left - 7, y: y(r + 0.5) + 4, "text-anchor": "end" }, firstOf(label)));
  const every = Math.ceil(bins.length / Math.max(2, Math.min(8, width / 80)));
  bins.forEach(([from], b) => { if (b % every === 0) draw(svg, "text", { x: x(b + 0.5), y: HEIGHT - PAD.bottom + 17, "text-anchor": "middle" }, spec.steps[from]); });
  draw(svg, "text", { x: width - PAD.right, y: HEIGHT - 2, "text-anchor": "end" }, "step");
  return {
    xs: bins.map((_, b) => b),
    place: (b) => ({ x: x(b + 0.5), dots: [] }),
    tell: (b) => tipTable(stepsText(spec.steps, bins[b]), spec.labels.map((label, r) => [`token ${label}`, number(cells[b][r]), cells[b][r] === null ? null : ramp(share(cells[b][r]))]).reverse()),
  };
}

const KINDS = { lines, stack, heat };

function mount(card, spec) {
  const legend = make("div", { class: "legend" });
  if (spec.kind === "heat") {
    const scale = make("span", {}, number(spec.range[0]), make("i", { class: "ramp" }), `${number(spec.range[1])} nats per token`);
    scale.querySelector("i").style.background = `linear-gradient(90deg, ${[0, 0.2, 0.4, 0.6, 0.8, 1].map(ramp).join(",")})`;
    legend.append(scale);
  } else if (spec.series.length > 1 || spec.series[0].always) {
    spec.series.forEach((series, n) => {
      const entry = make("span", {}, make("i"), series.name);
      entry.querySelector("i").style.background = colour(n);
      legend.append(entry);
    });
  }
  const plot = make("div", { class: "plot", tabindex: "0", role: "img", "aria-label": spoken(card, spec) });
  card.append(...(legend.childNodes.length ? [legend, plot] : [plot]));
  let drawn = null, at = -1;

  function redraw() {
    const width = Math.max(220, plot.clientWidth);
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    svg.setAttribute("aria-hidden", "true");
    drawn = KINDS[spec.kind](svg, width, spec);
    drawn.pointer = draw(svg, "g", {});
    drawn.svg = svg;
    plot.replaceChildren(svg);
  }

  function point(index, clientX, clientY) {
    at = Math.max(0, Math.min(drawn.xs.length - 1, index));
    const where = drawn.place(drawn.xs[at]), box = drawn.svg.getBoundingClientRect();
    drawn.pointer.replaceChildren();
    draw(drawn.pointer, "line", { x1: where.x, x2: where.x, y1: PAD.top, y2: HEIGHT - PAD.bottom, stroke: "var(--ink)", opacity: 0.35 });
    for (const [y, fill] of where.dots) draw(drawn.pointer, "circle", { cx: where.x, cy: y, r: 4.5, fill, stroke: "var(--card)", "stroke-width": 1.5 });
    const width = drawn.svg.viewBox.baseVal.width;
    showTip(drawn.tell(drawn.xs[at]), clientX ?? box.left + (where.x / width) * box.width, clientY ?? box.top + 30);
  }

  function leave() {
    if (drawn) drawn.pointer.replaceChildren();
    at = -1;
    hideTip();
  }

  plot.addEventListener("pointermove", (event) => {
    const box = drawn.svg.getBoundingClientRect(), width = drawn.svg.viewBox.baseVal.width;
    const x = ((event.clientX - box.left) / box.width) * width;
    let best = 0;
    drawn.xs.forEach((value, i) => { if (Math.abs(drawn.place(value).x - x) < Math.abs(drawn.place(drawn.xs[best]).x - x)) best = i; });
    point(best, event.clientX, event.clientY);
  });
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("blur", leave);
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1, Home: -1e9, End: 1e9 }[event.key];
    if (event.key === "Escape") leave();
    if (move === undefined) return;
    event.preventDefault();
    point(at < 0 && move > 0 && move < 2 ? 0 : at + move);
  });
  new ResizeObserver(redraw).observe(plot);
  redraw();
}

function spoken(card, spec) {
  const heading = card.querySelector("h3").textContent;
  if (spec.kind !== "lines") return `${heading}. Arrow keys read single steps.`;
  const form = formOf(spec);
  const parts = spec.series.map((s) => `${s.name}: ${form(s.y[0])} at first, ${form(s.y[s.y.length - 1])} at last`);
  return `${heading}. ${parts.join("; ")}. Arrow keys read single points.`;
}

// ---- from the columns of metrics.jsonl to charts

function column(key) {
  const xs = [], ys = [];
  (DATA.columns[key] || []).forEach((value, i) => { if (value !== null) { xs.push(DATA.steps[i]); ys.push(value); } });
  return { x: xs, y: ys };
}

for (const card of document.querySelectorAll("[data-chart]")) {
  const spec = DATA.charts[card.dataset.chart];
  if (spec.kind === "stack") for (const series of spec.series) series.y = DATA.columns[series.key];
  if (spec.kind === "stack") spec.steps = DATA.steps;
  if (spec.kind === "lines") for (const series of spec.series) if (series.key) Object.assign(series, column(series.key));
  mount(card, spec);
}

const picker = document.getElementById("metric");
if (picker) {
  const show = () => {
    const card = picker.closest(".chart");
    card.querySelectorAll(".legend, .plot").forEach((node) => node.remove());
    mount(card, { kind: "lines", series: [{ name: picker.value, ...column(picker.value) }] });
  };
  picker.addEventListener("change", show);
  show();
}

const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = document.getElementById("theme");
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  theme.textContent = name === "dark" ? "Light colours" : "Dark colours";
}
setTheme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
theme.addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
