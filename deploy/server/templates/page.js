const COLOURS = ["#2f7de1", "#e8710a", "#3a9d5d", "#7a5af8", "#d0a215", "#d1508f", "#0e9384",
  "#a0683f", "#6d83c9", "#7d8794"];
const VERBS = { level100: "load", level75: "level ¾", level50: "level ½", level25: "level ¼",
  level0: "level 0" };
const FALLBACKS = { deadline: "late", not_finite: "not a number", illegal: "not allowed",
  error: "failed" };
const SHOWN_DECISIONS = 80;
const RATE_S = 5;
const SILENCE_MS = 5000;
const GAP_S = 4;

const element = (id) => document.getElementById(id);
const rows = new Map();
let historySeconds = 300;
let samples = [];      // [{time_s, models: {name: [landed, target, queued, running]}}]
let totals = [];       // [{time_s, tokens, bytes, busy_s}], for rates
let reverted = null;
let engineStarted = null;
let lastDecision = -1;
let newest = null;     // the line of the last decision: {node, idle, by, since, verbs, models, count}

/* Numbers as people read them. */
const seconds = (value) => value < 0.0995 ? `${(value * 1000).toFixed(0)} ms`
  : value < 9.95 ? `${value.toFixed(value < 0.995 ? 2 : 1)} s`
  : value < 120 ? `${value.toFixed(0)} s` : span(value);
const size = (bytes) =>
  bytes < 0.95e9
    ? `${(bytes / 1e6).toFixed(bytes && bytes < 9.95e6 ? 1 : 0)} MB`
    : `${(bytes / 1e9).toFixed(bytes < 9.95e9 ? 1 : 0)} GB`;
function span(value) {
  const minutes = Math.floor(value / 60), hours = Math.floor(minutes / 60);
  if (hours >= 48) return `${Math.floor(hours / 24)} d ${hours % 24} h`;
  return hours ? `${hours} h ${minutes % 60} min` : minutes ? `${minutes} min` : `${Math.floor(value)} s`;
}
const times = (count) => count === 1 ? "once" : `${count.toLocaleString("en")} times`;
const colour = (name) => COLOURS[Math.max(0, [...rows.keys()].indexOf(name)) % COLOURS.length];

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "rect"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
function swatch(name, kind = "") {
  const node = make("i", { class: kind });
  node.style.background = colour(name);
  return node;
}
function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/* Models: a row each, made once. */
function row(name) {
  if (rows.has(name)) return rows.get(name);
  const made = {};
  rows.set(name, made);
  made.small = make("small");
  const title = make("div", { class: "name" }, swatch(name), name, made.small);
  made.area = make("path", { class: "area", fill: colour(name) });
  made.wanted = make("path", { class: "wanted", fill: colour(name) });
  made.queue = make("path", { class: "queue" });
  const timeline = make("svg", { class: "timeline", viewBox: "0 0 1000 100",
    preserveAspectRatio: "none", role: "img", "aria-label": `residency of ${name}` },
    made.wanted, made.area, made.queue);
  for (const [key, label] of [["queued", "wait"], ["running", "run"], ["suspended", "saved"],
    ["oldest", "oldest"]]) {
    made[key] = make("div", { class: "number", "data-name": label });
  }
  made.ttft = meter("first token (TTFT)");
  made.tpot = meter("per token (TPOT)");
  made.node = make("div", { class: "model", "data-model": name }, title, timeline, made.queued,
    made.running, made.suspended, made.oldest, made.ttft.node, made.tpot.node);
  element("models").append(made.node);
  return made;
}
function meter(label) {
  const made = { text: make("span") };
  const rect = (kind, y, height) => make("rect", { class: kind, x: 0, y, width: 0, height });
  made.median = rect("median", 0, 7);
  made.tail = rect("tail", 2.5, 2);
  made.target = make("rect", { class: "target", x: 66, y: 0, width: 1, height: 7 });
  const track = make("rect", { class: "track", x: 0, y: 2.5, width: 100, height: 2 });
  made.node = make("div", { class: "meter", "data-name": label }, made.text,
    make("svg", { viewBox: "0 0 100 7", preserveAspectRatio: "none", "aria-hidden": "true" },
      track, made.tail, made.median, made.target));
  return made;
}
function showMeter(made, values, target) {
  const width = (value) => Math.min(100, 66 * value / target);
  made.median.classList.toggle("over", Boolean(values && target && values.p50 > target));
  made.tail.classList.toggle("over", Boolean(values && target && values.p95 > target));
  // One unit for all three, that of the largest.
  const most = Math.max(values?.p95 ?? 0, target), unit = most < 0.9995 ? "ms" : "s";
  const inUnit = (value) => unit === "ms" ? (value * 1000).toFixed(0) : value.toFixed(value < 9.95 ? 1 : 0);
  const aim = make("small", {}, target ? ` of ${inUnit(target)} ${unit}` : values ? ` ${unit}` : "");
  made.text.replaceChildren(values ? `${inUnit(values.p50)} · ${inUnit(values.p95)}` : "–", aim);
  made.target.style.visibility = target ? "" : "hidden";
  made.median.setAttribute("width", values && target ? width(values.p50) : 0);
  made.tail.setAttribute("width", values && target ? width(values.p95) : 0);
}
function badges(model) {
  const found = [];
  const add = (text, bad) => found.push(make("span", { class: bad ? "badge bad" : "badge" }, ` · ${text}`));
  if (model.quarantined) add("quarantined", true);
  if (model.landed < model.target) add(`loads ${Math.round(100 * model.landed / model.pieces)} %`);
  else if (model.target === 1) add("base weights only");
  else if (model.target && model.target < model.pieces) add(`level ${Math.round(100 * (model.target - 1) / (model.pieces - 1))} %`);
  if (model.paused) add("paused");
  if (model.focus) add("focus");
  if (model.pinned) add("pinned");
  if (!model.target && !model.quarantined) found.push(" · out");
  return found;
}
function showModel(model, latency) {
  const made = row(model.name);
  made.small.replaceChildren(size(model.weight_bytes), ...badges(model));
  setText(made.queued, String(model.queued));
  setText(made.running, String(model.running));
  setText(made.suspended, String(model.suspended));
  setText(made.oldest, model.queued ? seconds(model.oldest_wait_s) : "–");
  made.oldest.classList.toggle("late", model.queued > 0 && model.oldest_wait_s > model.ttft_s);
  showMeter(made.ttft, latency?.ttft_s, model.ttft_s);
  showMeter(made.tpot, latency?.tpot_s, model.tpot_s);
}

/* Residency over time below, and above it how many requests wait, hanging from the top. */
const TOP = 30;
function drawTimelines(now) {
  const shown = Math.min(historySeconds, Math.max(60, now - (samples[0]?.time_s ?? now)));
  setText(element("window"), shown < 110 ? `${Math.round(shown)} s` : `${Math.round(shown / 60)} min`);
  const x = (time) => (1000 * (1 - (now - time) / shown)).toFixed(1);
  let most = 4;
  for (const sample of samples) for (const values of Object.values(sample.models)) most = Math.max(most, values[2]);
  setText(element("most"), String(most));
  for (const [name, made] of rows) {
    let area = "", wanted = "", queue = "";
    let start = 0;
    const runs = [];
    for (let k = 1; k <= samples.length; k++) {
      if (k === samples.length || samples[k].time_s - samples[k - 1].time_s > GAP_S) {
        runs.push(samples.slice(start, k));
        start = k;
      }
    }
    for (const run of runs) {
      const points = run.filter((sample) => name in sample.models);
      if (!points.length) continue;
      const end = run === runs.at(-1) ? Math.max(now, points.at(-1).time_s) : points.at(-1).time_s;
      // Steps: a value holds until the next sample.
      const steps = (index, height) => points.map((sample, k) => {
        const until = k + 1 < points.length ? points[k + 1].time_s : end;
        const y = height(sample.models[name][index]).toFixed(1);
        return `L${x(sample.time_s)} ${y}L${x(until)} ${y}`;
      }).join("");
      const from = x(points[0].time_s), to = x(end);
      const height = (share) => 100 - (100 - TOP) * share;
      area += `M${from} 100${steps(0, height)}L${to} 100Z`;
      wanted += `M${from} 100${steps(1, height)}L${to} 100Z`;
      queue += `M${from} 0${steps(2, (waiting) => (TOP - 4) * waiting / most)}L${to} 0Z`;
    }
    made.area.setAttribute("d", area);
    made.wanted.setAttribute("d", wanted);
    made.queue.setAttribute("d", queue);
  }
}

function showMemory(state) {
  const bar = element("bar"), parts = [];
  const add = (key, kind, name, bytes) => parts.push({ key, kind, name, bytes });
  for (const model of state.models) {
    add(`w ${model.name}`, "weights", model.name, model.resident_bytes);
    add(`k ${model.name}`, "kv", model.name, model.kv_bytes);
  }
  add("free", "free", null, state.free_bytes);
  add("reserve", "reserve", null, state.reserve_bytes);
  const held = new Map([...bar.children].map((node) => [node.dataset.key, node]));
  for (const part of parts) {
    let node = held.get(part.key);
    if (!node) {
      node = make("i", { class: part.kind, "data-key": part.key });
      if (part.name) node.style.background = colour(part.name);
      bar.append(node);
    }
    node.style.width = `${100 * part.bytes / state.budget_bytes}%`;
    node.title = `${part.name ?? "reserve"}: ${part.kind === "kv" ? "KV cache" : part.kind} ${size(part.bytes)}`;
  }
  const used = state.budget_bytes - state.free_bytes;
  const host = `${size(state.host_kv_bytes)} of KV cache saved on the host (at most ${size(state.host_kv_limit_bytes)})`;
  setText(element("memory"), `${size(used)} of ${size(state.budget_bytes)} · ${host}`);
  bar.setAttribute("aria-label", element("memory").textContent);
  element("key").replaceChildren(
    ...state.models.filter((model) => model.resident_bytes + model.kv_bytes).map((model) => make("span", {},
      swatch(model.name), `${model.name} ${size(model.resident_bytes)}`,
      ...(model.kv_bytes ? [swatch(model.name, "kv"), `KV ${size(model.kv_bytes)}`] : []))),
    make("span", {}, make("i", { class: "free" }), `free ${size(state.free_bytes)}`),
    make("span", {}, make("i", { class: "reserve" }),
      `set apart for computing and streaming ${size(state.reserve_bytes)}`));
}

function showTiles(state, latency) {
  const sum = (key) => state.models.reduce((total, model) => total + model[key], 0);
  setText(element("waiting"), String(sum("queued")));
  setText(element("running"), String(sum("running")));
  const oldest = Math.max(0, ...state.models.filter((model) => model.queued).map((model) => model.oldest_wait_s));
  setText(element("wait"), sum("queued") ? seconds(oldest) : "–");
  element("wait").classList.toggle("late",
    state.models.some((model) => model.queued && model.oldest_wait_s > model.ttft_s));
  const all = Object.values(latency);
  const requests = all.reduce((total, each) => total + each.requests, 0);
  const missed = all.reduce((total, each) => total + each.missed, 0);
  setText(element("missed"), requests ? `${missed} of ${requests}` : "–");
  element("missed").classList.toggle("late", missed > requests / 10);
  if (state.time_s < (totals.at(-1)?.time_s ?? 0)) totals = [];  // the server's clock was set back
  totals.push({ time_s: state.time_s, tokens: sum("decode_tokens"), bytes: sum("load_bytes") + sum("stream_bytes") + sum("kv_restore_bytes"), busy_s: state.h2d_busy_s });
  while (totals.length > 2 && totals[0].time_s < state.time_s - RATE_S) totals.shift();
  const passed = state.time_s - totals[0].time_s;
  if (passed > 0.5) {
    const since = (key) => (totals.at(-1)[key] - totals[0][key]) / passed;
    setText(element("tokens"), since("tokens").toFixed(0));
    setText(element("bytes"), `${size(since("bytes"))}/s`);
    setText(element("busy"), `over the link, ${(100 * Math.min(1, since("busy_s"))).toFixed(0)} % busy`);
  }
}

/* A line for each decision, but one for a run of those on models that nobody asks for. */
function showDecision(decision) {
  const idle = decision.reason.startsWith("idle");
  if (!(idle && newest?.idle && newest.by === decision.by)) {
    newest = { node: make("li"), idle, by: decision.by, since: decision.time_s, verbs: new Set(),
      models: new Set(), count: 0 };
    element("decisions").prepend(newest.node);
  }
  newest.verbs.add(VERBS[decision.verb] ?? decision.verb);
  newest.models.add(decision.model);
  newest.count++;
  const when = new Date(decision.time_s * 1000);
  const by = decision.by === "policy" ? "" : make("em", {}, ` by ${decision.by === "node" ? "the node" : `the ${decision.by}`}`);
  const passed = span(Math.max(1, decision.time_s - newest.since));
  newest.node.replaceChildren(
    make("time", { datetime: when.toISOString() }, when.toLocaleTimeString([], { hour12: false })),
    ...[...newest.models].map((name) => swatch(name)),
    make("b", {}, `${[...newest.verbs].join(", ")} ${[...newest.models].join(", ")}`), by,
    make("p", {}, newest.count === 1 ? decision.reason
      : `${times(newest.count)} in ${passed}, while idle`));
}
function showDecisions(state) {
  const list = element("decisions");
  for (const decision of state.decisions) {
    if (decision.number <= lastDecision) continue;
    lastDecision = decision.number;
    showDecision(decision);
  }
  while (list.children.length > SHOWN_DECISIONS) list.lastChild.remove();
  const failed = Object.entries(state.fallbacks).filter(([, count]) => count)
    .map(([why, count]) => `${FALLBACKS[why] ?? why} ${times(count)}`).join(", ");
  setText(element("asked"), `asked ${times(state.decisions_asked)}`
    + (failed && ` · ${state.champion} stood in: answer ${failed}`));
}

function showHead(ready, state) {
  const link = element("link");
  link.className = ready && !state?.draining ? "" : "off";
  setText(link, !ready ? "the engine does not serve" : state?.draining ? "draining" : "live");
  const notice = element("notice");
  notice.hidden = !state?.reverted;
  if (!state) return;
  element("about").replaceChildren(`${state.device} · up ${span(state.time_s - state.started_s)} · `,
    make("b", {}, state.policy), " decides");
  if (state.reverted) setText(notice, `An operator reverted this node: the champion (${state.champion}) decides until the policy is restored.`);
  reverted = state.reverted;
  const button = element("revert"), already = !reverted && state.policy === state.champion;
  button.disabled = busy || already;
  button.title = already ? `${state.champion} is the champion` : "";
  button.classList.toggle("reverted", reverted);
  setText(button, reverted ? "Let the policy decide" : `Revert to ${state.champion}`);
}

function show(message) {
  if (message.history) {
    historySeconds = message.history_s;
    // What was seen before a restart of the server stays; it knows only what came after.
    const first = message.history[0]?.time_s ?? Infinity;
    samples = samples.filter((sample) => sample.time_s < first).concat(message.history);
  }
  const state = message.state;
  if (state) {
    if (state.started_s !== engineStarted) {
      engineStarted = state.started_s;
      totals = [];
      lastDecision = -1;
      newest = null;
    }
    for (const model of state.models) showModel(model, message.latency[model.name]);
    for (const [name, made] of rows) made.node.hidden = !state.models.some((model) => model.name === name);
    // What is later than now was seen before the server's clock was set back.
    samples = samples.filter((sample) =>
      sample.time_s > state.time_s - historySeconds && sample.time_s <= state.time_s);
    const last = samples.at(-1)?.time_s ?? 0;
    if (state.time_s - last >= 1) {
      samples.push({ time_s: state.time_s, models: Object.fromEntries(state.models.map((model) =>
        [model.name, [model.landed / model.pieces, model.target / model.pieces, model.queued, model.running]])) });
    }
    drawTimelines(state.time_s);
    showMemory(state);
    showTiles(state, message.latency);
    showDecisions(state);
  }
  showHead(message.ready, state);
}

/* The stream of events; whatever ends it, it is opened again. */
let source = null;
let silence = 0;
function connect() {
  source?.close();
  source = new EventSource("admin/events");
  source.onmessage = (event) => {
    listen();
    show(JSON.parse(event.data));
  };
  source.onerror = () => again(1000);
  listen();
}
function listen() {
  clearTimeout(silence);
  silence = setTimeout(() => again(0), SILENCE_MS);
}
function again(delay) {
  source.close();
  clearTimeout(silence);
  setText(element("link"), "reconnecting");
  element("link").className = "off";
  element("revert").disabled = true;
  setTimeout(connect, delay);
}

/* The button: one click, and a key where the server wants one. */
const STORED = "mmrl-key";
let busy = false;
element("revert").onclick = async () => {
  busy = true;
  element("revert").disabled = true;
  try {
    await command(reverted ? "restore" : "revert");
  } finally {
    busy = false;
    element("revert").disabled = false;
  }
};
async function command(name) {
  let refused = false;
  for (;;) {
    let key = sessionStorage.getItem(STORED);
    if (KEYED && !key) {
      key = await askKey(refused);
      if (!key) return;
      sessionStorage.setItem(STORED, key);
    }
    let answer;
    try {
      answer = await fetch(`admin/${name}`, { method: "POST", headers: key ? { Authorization: `Bearer ${key}` } : {} });
    } catch {
      return alert("The server does not answer.");
    }
    if (answer.ok) return;
    if (answer.status !== 401 || !KEYED) {
      const body = await answer.json().catch(() => null);
      return alert(body?.error?.message ?? `The server answered ${answer.status}.`);
    }
    sessionStorage.removeItem(STORED);
    refused = true;
  }
}
function askKey(refused) {
  const dialog = element("ask");
  element("wrong").hidden = !refused;
  element("secret").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close",
    () => resolve(dialog.returnValue === "go" ? element("secret").value : ""), { once: true }));
}

connect();
