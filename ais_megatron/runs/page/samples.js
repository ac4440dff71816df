"use strict";
// The responses: filters, shaded tokens, and what engine and trainer thought of each token. A response is hostile text, so all text goes
// into the page as text nodes.

const SAMPLES = DATA.samples;
const PAGE = 12; // responses that are shown before "more" is asked for
const FIRST_TOKENS = 1500; // of a long response, before all are asked for
const NGRAM = 4, REPETITIVE = DATA.repetitive, SCALES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5];
// Characters that a reader would not see, or that would turn the text around.
const INVISIBLE = /[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
const ODD = /[\ufffd\u2047\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\ue000-\uf8ff]/;

const find = (id) => document.getElementById(id);

function visible(text) {
  return text.replace(INVISIBLE, (c) => (c === "\t" ? "⇥\t" : c < " " ? String.fromCharCode(0x2400 + c.charCodeAt(0)) : `⟨U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`));
}

function quoted(text) {
  return text === "" ? "no text of its own" : `“${visible(text).replace(/\n/g, "↵").replace(/\t/g, "")}”`;
}

function probability(logprob) {
  const p = 100 * Math.exp(logprob);
  if (p > 99.9 && p < 100) return `${p.toFixed(4)} %`;
  return p >= 0.01 ? `${+p.toPrecision(4)} %` : `${p.toExponential(2).replace("e-", "e−")} %`;
}

const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);

function ratiosOf(sample) {
  return sample.old_logprobs && sample.old_logprobs.map((old, i) => old - sample.rollout_logprobs[i]);
}

function usualScale() {
  const all = [];
  for (const sample of SAMPLES) for (const ratio of ratiosOf(sample) || []) all.push(Math.abs(ratio));
  all.sort((a, b) => a - b);
  const high = all.length ? all[Math.floor(0.97 * (all.length - 1))] : 0.1;
  return SCALES.find((scale) => scale >= high) || SCALES[SCALES.length - 1];
}

function repeated(tokens) {
  const seen = new Set(), marked = new Set();
  for (let i = 0; i + NGRAM <= tokens.length; i++) {
    const key = JSON.stringify(tokens.slice(i, i + NGRAM));
    if (seen.has(key)) for (let k = 0; k < NGRAM; k++) marked.add(i + k);
    seen.add(key);
  }
  return marked;
}

function shadeOf(ratio) {
  const strength = Math.min(1, Math.abs(ratio) / +find("scale").value);
  return strength < 0.03 ? "" : `rgba(var(${ratio > 0 ? "--more" : "--less"}), ${(0.85 * strength).toFixed(3)})`;
}

function shade(box) {
  const ratios = find("shaded").checked ? ratiosOf(box.sample) : null;
  const again = find("marked").checked ? (box.again ||= repeated(box.sample.tokens)) : null;
  for (const token of box.querySelectorAll("b")) {
    const i = +token.dataset.i;
    token.style.background = ratios ? shadeOf(ratios[i]) : "";
    token.classList.toggle("again", Boolean(again && again.has(i)));
  }
}

function addTokens(box, from, to) {
  const nodes = [];
  box.sample.tokens.slice(from, to).forEach((text, k) => {
    const token = make("b", { "data-i": from + k });
    if (ODD.test(text)) token.className = "odd";
    if (text === "") token.append(make("u", {}, from + k === box.sample.tokens.length - 1 ? "∎" : "·"));
    else visible(text).split(/(\n)/).forEach((part) => (part === "\n" ? token.append(make("u", {}, "↵"), "\n") : token.append(part)));
    nodes.push(token);
  });
  box.append(...nodes);
}

function explain(box, index) {
  const sample = box.sample, engine = sample.rollout_logprobs[index], ratios = ratiosOf(sample);
  const rows = [["engine", probability(engine)]];
  if (ratios) rows.push(["trainer", probability(sample.old_logprobs[index])], ["log ratio", signed(ratios[index], 5)], ["ratio", Math.exp(ratios[index]).toFixed(4)]);
  else rows.push(["trainer", "not recorded"]);
  const content = tipTable(`token ${index + 1} of ${sample.tokens.length}`, rows);
  content.prepend(make("span", { class: "what" }, quoted(sample.tokens[index])));
  return content;
}

let active = null;
function activate(token, x, y) {
  if (active) active.classList.remove("on");
  active = token;
  if (!token) return hideTip();
  token.classList.add("on");
  const box = token.getBoundingClientRect();
  const content = explain(token.closest(".tokens"), +token.dataset.i);
  showTip(content, x ?? box.left, y ?? box.bottom - 12);
  if (x === undefined) find("spoken").textContent = content.textContent;
}

function tokensOf(sample) {
  const box = make("div", { class: "tokens text", tabindex: "0", role: "group", "aria-label": "Response. Arrow keys read single tokens." });
  box.sample = sample;
  addTokens(box, 0, FIRST_TOKENS);
  box.addEventListener("pointerover", (event) => {
    const token = event.target.closest("b");
    activate(token, event.clientX, event.clientY);
  });
  box.addEventListener("pointermove", (event) => { if (active && !tip.hidden && event.target.closest("b") === active) showTip(tip.firstChild, event.clientX, event.clientY); });
  box.addEventListener("pointerleave", () => activate(null));
  box.addEventListener("blur", () => activate(null));
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") activate(null);
    const move = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    if (!move) return;
    event.preventDefault();
    const next = active && active.parentNode === box ? active[move] : box.firstElementChild;
    if (next && next.tagName === "B") { next.scrollIntoView({ block: "nearest" }); activate(next); }
  });
  shade(box);
  return box;
}

function chip(text, kind, title) {
  return make("span", { class: `chip ${kind || ""}`, title }, text);
}

function outcomeOf(sample) {
  return sample.correct ? "correct" : sample.well_formed ? "wrong" : "malformed";
}

function card(sample) {
  const header = make("header", {}, make("h3", {}, `Step ${sample.step}, prompt ${sample.prompt_index}`));
  const outcome = outcomeOf(sample);
  header.append(chip(`reward ${number(sample.reward)}`));
  header.append(outcome === "correct" ? chip("✓ correct", "good") : chip(outcome === "wrong" ? "✗ wrong" : "✗ no answer found", "bad"));
  if (sample.repetition >= REPETITIVE) header.append(chip(`repetitive, ${Math.round(100 * sample.repetition)} %`, "warn", `share of its ${NGRAM}-grams that occurred before`));
  if (sample.garbled) header.append(chip("garbled", "warn", "characters that cannot belong to a text"));
  if (sample.finish_reason !== "stop") header.append(chip(sample.finish_reason === "length" ? "cut at the limit" : sample.finish_reason, "warn"));
  const facts = make("p", { class: "facts" });
  const tell = (...parts) => facts.append(make("span", {}, ...parts), " ");
  tell(`advantage ${signed(sample.advantage, 3)}`);
  tell(`${sample.length.toLocaleString("en-US")} tokens`);
  tell(`repetition ${Math.round(100 * sample.repetition)} %`);
  const ratios = ratiosOf(sample);
  if (ratios) {
    tell(`D ${number(mean(ratios.map((l) => Math.expm1(l) - l)))} nats per token`);
    tell(`largest |log ratio| ${number(ratios.reduce((a, b) => Math.max(a, Math.abs(b)), 0))}`);
  } else tell("no log-probabilities of the trainer");
  tell(`weights of version ${sample.weight_version}`);
  const box = tokensOf(sample);
  const node = make("article", { class: "sample" }, header, facts);
  const brief = visible(sample.prompt).replace(/\s+/g, " ").slice(0, 160);
  if (sample.prompt.length <= 160 && !sample.prompt.includes("\n")) node.append(make("p", { class: "asked" }, make("strong", {}, "Prompt: "), visible(sample.prompt)));
  else node.append(make("details", {}, make("summary", {}, `Prompt: ${brief}`), make("div", { class: "prompt text" }, visible(sample.prompt))));
  node.append(box);
  if (sample.tokens.length > FIRST_TOKENS) {
    const button = make("button", { class: "more", type: "button" }, `Show all ${sample.tokens.length.toLocaleString("en-US")} tokens`);
    button.addEventListener("click", () => { addTokens(box, FIRST_TOKENS); shade(box); button.remove(); });
    node.append(button);
  }
  if (sample.reason) node.append(make("p", { class: "reason" }, make("strong", {}, "Reason: "), visible(sample.reason)));
  return node;
}

// ---- filters

function wanted() {
  const step = find("step").value, outcome = find("outcome").value, text = find("search").value.trim().toLowerCase();
  const least = find("least").value === "" ? -Infinity : +find("least").value, most = find("most").value === "" ? Infinity : +find("most").value;
  const flag = find("flag").value;
  return SAMPLES.filter((s) =>
    (step === "all" || s.step === +step) &&
    (outcome === "all" || outcomeOf(s) === outcome) &&
    s.reward >= least && s.reward <= most &&
    (flag === "all" || (flag === "repetitive" && s.repetition >= REPETITIVE) || (flag === "garbled" && s.garbled) || (flag === "cut" && s.finish_reason === "length")) &&
    (!text || [s.prompt, s.response, s.reason].some((t) => t.toLowerCase().includes(text))));
}

const disagreement = (s) => { const r = ratiosOf(s); return r ? mean(r.map((l) => Math.expm1(l) - l)) : 0; };
const ORDERS = {
  sampled: null, best: (a, b) => b.reward - a.reward, worst: (a, b) => a.reward - b.reward, longest: (a, b) => b.length - a.length,
  disagreement: (a, b) => disagreement(b) - disagreement(a), repetition: (a, b) => b.repetition - a.repetition,
};

let limit = PAGE;
function list() {
  activate(null);
  const found = wanted(), order = ORDERS[find("order").value];
  if (order) found.sort(order);
  const shown = found.slice(0, limit);
  find("count").textContent = found.length ? `${found.length} of ${SAMPLES.length} responses` : "No response fits these filters.";
  const more = found.length > limit ? make("button", { class: "more", type: "button" }, `Show ${Math.min(PAGE, found.length - limit)} more`) : null;
  if (more) more.addEventListener("click", () => { limit += PAGE; list(); });
  find("list").replaceChildren(...shown.map(card), ...(more ? [more] : []));
  const steps = [...find("step").options].map((o) => o.value), at = steps.indexOf(find("step").value);
  find("earlier").disabled = at < 2;
  find("later").disabled = at < 1 || at === steps.length - 1;
}

function go(by) {
  find("step").selectedIndex += by;
  limit = PAGE;
  list();
}

if (SAMPLES.length) {
  const steps = [...new Set(SAMPLES.map((s) => s.step))].sort((a, b) => a - b);
  find("step").append(make("option", { value: "all" }, "all steps"), ...steps.map((s) => make("option", { value: s }, `step ${s}`)));
  find("step").value = steps[steps.length - 1];
  find("scale").append(...SCALES.map((s) => make("option", { value: s }, `±${s}`)));
  find("scale").value = usualScale();
  for (const id of ["step", "outcome", "least", "most", "flag", "order", "search"]) find(id).addEventListener("input", () => { limit = PAGE; list(); });
  for (const id of ["scale", "shaded", "marked"]) find(id).addEventListener("input", () => document.querySelectorAll(".tokens").forEach(shade));
  find("scale").addEventListener("input", ends);
  find("earlier").addEventListener("click", () => go(-1));
  find("later").addEventListener("click", () => go(1));
  ends();
  list();
}

function ends() {
  find("low").textContent = `−${find("scale").value}`;
  find("high").textContent = `+${find("scale").value}`;
}
