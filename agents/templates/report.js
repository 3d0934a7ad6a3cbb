/* The report: what the reader chose is the state; tables and figures follow from it and the data. */
const element = (id) => document.getElementById(id);
const index = JSON.parse(element("index").textContent);
const { policies, places, runs, episodes } = index;
const cells = (index.cells.place ?? []).map((_, k) =>
  Object.fromEntries(Object.entries(index.cells).map(([name, column]) => [name, column[k]])));
const CHALLENGERS = ["learned", "live"];
const FIRST_VERDICTS = 12;
const LEGEND = 20; // policies in it at once
const state = {
  platform: "", family: "", load: "", place: 0, placeLoad: "", all: false, seeds: false, everyone: false,
  shown: policies.flatMap((policy, k) => (policy.shown ? [k] : [])),
  runs: runs.flatMap((run, k) => (run.shown ? [k] : [])),
  episode: 0, left: null, right: null, time: null,
};

/* Small things. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "line", "circle", "path"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const number = (value, digits) => value === null || value === undefined ? "–"
  : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const share = (value) => number(value === null ? null : 100 * value, 1);
function points(value) {
  const text = (100 * value).toFixed(1);
  return /^-?0\.0$/.test(text) ? "0.0" : (value > 0 ? `+${text}` : text.replace("-", "−"));
}
const pValue = (p) => p === null ? "–" : p < 0.001 ? "<.001" : p.toFixed(3).replace(/^0/, "");
const verdict = ([, low, high]) => low > 0 ? "wins" : high < 0 ? "loses" : "ties";
const unique = (values) => [...new Set(values)];
const loadsOf = (some) => unique(some.map((cell) => cell.load)).sort((a, b) => a - b);
const DASHES = { solid: null, dot: "2 2", dash: "5 3", dashdot: "5 2 1 2", longdash: "8 3" };
function swatch({ colour, dash }) {
  return make("svg", { viewBox: "0 0 18 8", "aria-hidden": "true" },
    make("line", { x1: 0, y1: 4, x2: 18, y2: 4, stroke: colour, "stroke-width": 4, "stroke-dasharray": DASHES[dash] }));
}
function dot({ colour }) {
  const node = make("i");
  node.style.background = colour;
  return node;
}
function named(k) {
  const policy = policies[k];
  return [dot(policy), policy.name, ...(policy.kind === "live" ? [make("span", { class: "badge" }, "live")] : [])];
}

/* Data files register themselves here; each is loaded once, when it is wanted. */
const files = new Map();
const arrived = new Map();
window.mmrlData = (name, data) => arrived.set(name, data);
function load(name) {
  if (!files.has(name)) {
    files.set(name, new Promise((resolve, reject) => {
      const script = make("script", { src: name });
      script.onload = () => resolve(arrived.get(name));
      script.onerror = () => { files.delete(name); reject(new Error(`${name} is missing beside this page`)); };
      document.head.append(script);
    }));
  }
  return files.get(name);
}

/* Figures are drawn when they come into view, and again when what they show has changed. */
const drawn = new Map();
const inView = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const figure = drawn.get(target);
    if (!figure) continue;
    figure.visible = isIntersecting;
    paint(figure);
  }
}, { rootMargin: "200px" });
function figure(parent, id, build, height = 320) {
  let node = document.querySelector(`[data-figure="${id}"]`);
  if (!node) {
    const title = make("b"), about = make("small");
    const plot = make("div", { class: "plot", role: "img" });
    node = make("figure", { "data-figure": id }, make("figcaption", {}, title, about), plot);
    parent.append(node);
    drawn.set(node, { node, title, about, plot, visible: false });
    inView.observe(node);
  }
  const known = drawn.get(node);
  if (!known.plot.querySelector(".empty")) known.plot.style.height = `${height}px`;
  Object.assign(known, { build, height, stale: true });
  paint(known);
  return node;
}
async function paint(known) {
  if (!known.stale || !known.visible || !window.Plotly) return;
  known.stale = false;
  let made;
  try {
    made = await known.build();
  } catch (error) {
    made = { title: known.title.textContent, about: "", empty: error.message, data: [] };
  }
  if (known.stale) return paint(known); // changed meanwhile
  known.title.textContent = made.title;
  known.about.textContent = made.data.length ? made.about : "";
  known.plot.setAttribute("aria-label", `${made.title}. ${known.about.textContent}`);
  if (!made.data.length) {
    window.Plotly.purge(known.plot);
    known.plot.style.height = "";
    return known.plot.replaceChildren(make("p", { class: "empty" }, made.empty ?? "Nothing to show for this choice."));
  }
  known.plot.querySelector(".empty")?.remove();
  known.plot.style.height = `${made.height ?? known.height}px`;
  await window.Plotly.react(known.plot, made.data, completed(made.layout), { displayModeBar: false, responsive: true });
  made.after?.(known.plot);
}
addEventListener("load", () => drawn.forEach(paint));

/* Filters. */
const fits = (place) => (!state.platform || place.platform === state.platform) && (!state.family || place.family === state.family);
const chosen = () => cells.filter((cell) => fits(places[cell.place]) && (state.load === "" || cell.load === Number(state.load)));
function options(select, values, value, all) {
  const list = all ? [["", all], ...values] : values;
  select.replaceChildren(...list.map(([key, text]) => make("option", { value: key }, text)));
  select.value = String(value);
  select.closest("label").hidden = values.length < 2;
}
const same = (values) => values.map((value) => [String(value), String(value)]);
function showFilters() {
  options(element("platform"), same(unique(places.map((place) => place.platform)).sort()), state.platform, "all");
  options(element("family"), same(unique(places.map((place) => place.family)).sort()), state.family, "all");
  options(element("load"), same(loadsOf(cells)), state.load, "all");
  const some = chosen(), where = unique(some.map((cell) => cell.place)).length;
  const who = unique(some.map((cell) => cell.policy)).length;
  element("count").textContent = !where ? "Nothing was played there: choose otherwise."
    : `${where} of ${counted(places.length, "place")}, ${who} ${who === 1 ? "policy" : "policies"}`;
}

/* Intervals as pictures; what loses by far would flatten the others: the middle of all decides. */
function reachOf(intervals) {
  const ends = intervals.map((values) => Math.max(...values.map(Math.abs))).sort((a, b) => a - b);
  return ends.length ? Math.max(1.5 * ends[Math.floor(ends.length / 2)], 0.005) : 0.01;
}
function versus(interval, reach) {
  if (!interval) return [make("td", { class: "versus" }), make("td", { class: "interval" })];
  const x = (value) => Math.max(-48, Math.min(48, 48 * value / reach)).toFixed(1);
  const [middle, low, high] = interval;
  const mark = Math.abs(middle) <= reach ? make("circle", { cx: x(middle), cy: 0, r: 2.6 })
    : make("path", { d: "M4-4L-2 0L4 4Z", transform: `translate(${x(middle)})${middle > 0 ? " scale(-1)" : ""}` });
  const picture = make("svg", { class: "whisker", viewBox: "-50 -8 100 16", "aria-hidden": "true" },
    make("line", { class: "zero", x1: 0, y1: -8, x2: 0, y2: 8 }),
    ...(low === null || x(low) === x(high) ? [] : [make("path", { d: `M${x(low)} 0H${x(high)}M${x(low)}-5V5M${x(high)}-5V5` })]), mark);
  return [make("td", { class: "versus" }, picture), make("td", { class: "interval" },
    make("b", { class: verdict(interval) }, points(middle)),
    make("span", {}, ...(low === null ? ["too few episodes"]
      : [make("span", {}, points(low)), " to ", make("span", {}, points(high))])))];
}
const heads = (...names) => make("tr", {}, ...names.map((name) => name instanceof Node ? name : make("th", {}, name)));
const head = (text, attributes) => make("th", attributes, text);

/* The verdict: a row for each learned policy, place and load. */
function showVerdicts() {
  const some = chosen();
  const spots = new Map();
  for (const cell of some) {
    const key = `${cell.place}|${cell.load}`;
    spots.set(key, [...(spots.get(key) ?? []), cell]);
  }
  const rows = [...spots.values()].flatMap((spot) => {
    const challengers = spot.filter((cell) => CHALLENGERS.includes(policies[cell.policy].kind) && cell.difference);
    const best = spot.filter((cell) => cell.best);
    return challengers.length ? challengers.sort((a, b) => b.goodput - a.goodput) : best;
  });
  const shown = state.all ? rows : rows.slice(0, FIRST_VERDICTS);
  const reach = reachOf(shown.flatMap((cell) => (cell.difference ? [cell.difference] : [])));
  const body = shown.map((cell) => {
    const place = places[cell.place], kind = policies[cell.policy].kind;
    const link = make("a", { href: "#place-title" }, place.name);
    link.onclick = (happened) => {
      happened.preventDefault(); // the address keeps the choice
      goToPlace(cell);
    };
    const rule = some.find((other) => other.place === cell.place && other.load === cell.load && other.policy === cell.versus);
    return make("tr", {}, make("th", {}, link), make("td", {}, number(cell.load, 1)),
      make("td", { class: "name" }, ...named(cell.policy)), make("td", { class: "extra" }, share(cell.goodput)),
      ...(cell.versus === null || !CHALLENGERS.includes(kind)
        ? [make("td", { class: "versus", colspan: 2 }, "the best rule here"), make("td", { class: "name" }), make("td", { class: "extra" })]
        : [...versus(cell.difference, reach), make("td", { class: "name" }, ...named(cell.versus)), make("td", { class: "extra" }, rule ? share(rule.goodput) : "–")]),
      make("td", { class: "extra" }, pValue(cell.p)), make("td", {}, number(cell.episodes, 0)));
  });
  element("verdicts").closest("section").hidden = !rows.length;
  element("verdicts").replaceChildren(make("thead", {},
    heads("Place", "Load", head("Policy", { class: "name" }), head("Goodput", { class: "extra" }), head("Against the best rule, points", { class: "versus", colspan: 2 }),
      head("Best rule", { class: "name" }), head("Goodput", { class: "extra" }), head("p", { class: "extra", title: "sign-flip test, adjusted for all comparisons of an evaluation (Holm)" }), "Episodes"),
    make("tr", { class: "units" }, ...["", "", ""].map((unit) => head(unit, {})), head("%", { class: "extra" }), head("95 % interval", { class: "versus", colspan: 2 }),
      head("", {}), head("%", { class: "extra" }), head("", { class: "extra" }), head("", {}))),
  make("tbody", {}, ...body));
  const button = element("all-verdicts");
  button.hidden = rows.length <= FIRST_VERDICTS;
  button.textContent = state.all ? "Show the first only" : `Show all ${rows.length}`;
}

/* What a frozen benchmark says over several cells: training seeds together, or each of them too. */
function showPools() {
  index.suites.forEach(({ pools }, k) => {
    // A pool that holds other cells too says nothing of the choice alone.
    const fitting = state.family ? [] : pools.filter((row) => (!state.platform || row.platform === state.platform)
      && (state.load === "" || row.load === Number(state.load)));
    element(`pools-${k}`).closest("section").hidden = !fitting.length;
    const rows = fitting.filter((row) => state.seeds || !row.is_member).sort((a, b) => b.seeds - a.seeds);
    const reach = Math.max(0.005, ...rows.flatMap((row) => [Math.abs(row.goodput_low), Math.abs(row.goodput_high)]));
    element(`pools-${k}`).replaceChildren(make("thead", {},
      heads("Pool", head("Policy", { class: "name" }), head("Seeds", { class: "extra" }), head("Cells", { class: "extra" }),
        head("Against the best rules, points", { class: "versus", colspan: 2 }), head("Their goodput, %", { class: "extra" }), head("p", { class: "extra" }))),
    make("tbody", {}, ...rows.map((row) => {
      const known = policies.findIndex((policy) => policy.name === row.policy);
      return make("tr", {}, make("th", {}, row.pool), make("td", { class: "name" }, ...(known < 0 ? [row.policy] : named(known))),
        make("td", { class: "extra" }, number(row.seeds, 0)), make("td", { class: "extra" }, number(row.cells, 0)),
        ...versus([row.goodput, row.goodput_low, row.goodput_high], reach),
        make("td", { class: "extra" }, share(row.goodput_reference)), make("td", { class: "extra" }, pValue(row.p_holm ?? row.p)));
    })));
    const button = element(`pool-seeds-${k}`);
    button.hidden = !fitting.some((row) => row.is_member);
    button.textContent = state.seeds ? "Show seeds together only" : "Show each training seed";
    button.onclick = () => { state.seeds = !state.seeds; showPools(); };
  });
}

/* Who is shown in the figures: a button for each policy that the filters leave. */
function legend(id, entries, list, redraw) {
  const parent = element(id);
  if (!parent) return;
  parent.replaceChildren(...entries.map(([k, entry]) => {
    const button = make("button", { type: "button", "aria-pressed": list.includes(k), "data-name": entry.name }, swatch(entry), entry.name);
    button.onclick = () => {
      const place = list.indexOf(k);
      if (place < 0) list.push(k); else list.splice(place, 1);
      button.setAttribute("aria-pressed", place < 0);
      remember();
      redraw();
    };
    return button;
  }));
}
function showLegend() {
  const present = unique(chosen().map((cell) => cell.policy)).sort((a, b) => a - b);
  const first = present.filter((k) => state.shown.includes(k));
  const others = present.filter((k) => !first.includes(k));
  const hidden = !state.everyone && present.length > LEGEND;
  legend("legend", [...first, ...(hidden ? [] : others)].map((k) => [k, policies[k]]), state.shown, showFigures);
  if (!hidden || !others.length) return;
  const more = make("button", { type: "button" }, `and ${others.length} more`);
  more.onclick = () => { state.everyone = true; showLegend(); };
  element("legend").append(more);
}

function showFigures() {
  if (!places.length) return;
  const some = chosen().filter((cell) => state.shown.includes(cell.policy));
  figure(element("trade"), "load", () => loadCurves(some), 340);
  figure(element("trade"), "pareto-loads", () => pareto(some, "loads_per_s"), 340);
  figure(element("trade"), "pareto-ttft", () => pareto(some, "ttft_p99_s"), 340);
  if (state.placeLoad !== "") showPlaceFigures();
}

/* One place. */
const placeCells = () => cells.filter((cell) => cell.place === state.place && cell.load === Number(state.placeLoad));
function showPlace() {
  const open = unique(chosen().map((cell) => cell.place));
  if (!open.length) return;
  if (!open.includes(state.place)) state.place = open[0];
  const place = places[state.place];
  const loads = loadsOf(cells.filter((cell) => cell.place === state.place));
  if (!loads.includes(Number(state.placeLoad)) || state.placeLoad === "") {
    state.placeLoad = String(loads.includes(Number(state.load)) && state.load !== "" ? state.load : place.main_load);
  }
  options(element("place"), open.map((k) => [String(k), places[k].name]), state.place);
  options(element("place-load"), same(loads), state.placeLoad);
  const rows = placeCells();
  const most = Math.max(...rows.map((cell) => cell.episodes));
  const source = most === 1 ? place.source.replace(/(window|episode)s/, "$1") : place.source;
  element("place-about").textContent = `${place.name}: ${number(most, 0)} ${source}, load ${state.placeLoad}, `
    + `on ${place.platform}, ${place.family}; ${number(Math.max(...rows.map((cell) => cell.requests)), 0)} requests a policy.`;
  element("place-notes").replaceChildren(...place.notes.map((note) => make("p", { class: "note" }, note)));
  showPolicies(rows);
  showPlaceFigures();
}
const COLUMNS = [ // field, heading, unit, digits, what it is
  ["goodput_iqm", "IQM", "%", "share", "interquartile mean"],
  ["improvement", "P(better)", "", 2, "share of episodes with more goodput than the best rule; ties count half"],
  ["p", "p", "", "p", "sign-flip test, adjusted for all comparisons of an evaluation (Holm)"],
  ["goodput_worst_model", "Worst model", "%", "share", "goodput of the worst model of each episode, mean"],
  ["norm_latency", "Norm. latency", "×", 2, "E2E over the latency of the request alone, mean"],
  ["ttft_p50_s", "TTFT p50", "s", 2, "time to first token, over all requests"],
  ["ttft_p99_s", "p99", "s", 1, "time to first token, over all requests"],
  ["longest_wait_s", "Longest wait", "s", 1, "for a first token, over all episodes"],
  ["loads_per_s", "Loads", "/s", 2, "of models"],
  ["preemptions_per_s", "Preempt.", "/s", 2, "sequences preempted"],
  ["decision_us", "Decision", "µs", 0, "median, on the machine that evaluated"],
];
const shownAs = (value, how) => how === "share" ? share(value) : how === "p" ? pValue(value) : number(value, how);
function showPolicies(rows) {
  rows.sort((a, b) => (b.goodput ?? 0) - (a.goodput ?? 0));
  const reach = reachOf(rows.flatMap((cell) => (cell.difference ? [cell.difference] : [])));
  element("policies").replaceChildren(
    make("thead", {}, heads("Policy", "Goodput", head("Against the best rule, points", { class: "versus", colspan: 2 }),
      ...COLUMNS.map(([, name, , , title]) => head(name, { title }))),
    make("tr", { class: "units" }, head("", {}), head("%", {}), head("95 % interval", { class: "versus", colspan: 2 }),
      ...COLUMNS.map(([, , unit]) => head(unit, {})))),
    make("tbody", {}, ...rows.map((cell) => make("tr", { class: policies[cell.policy].kind }, make("th", {}, ...named(cell.policy)),
      make("td", {}, share(cell.goodput)),
      ...(cell.best ? [make("td", { class: "versus", colspan: 2 }, "best rule")] : versus(cell.difference, reach)),
      ...COLUMNS.map(([field, , , how]) => make("td", {}, shownAs(cell[field], how)))))));
}
async function showModels() {
  const name = places[state.place].file;
  const { models } = await load(name).catch(() => ({ models: [] }));
  if (places[state.place].file !== name) return;
  const mine = models.filter(([at, policy]) => at === Number(state.placeLoad) && state.shown.includes(policy));
  const found = new Map(mine.map(([, policy, model, , goodput]) => [`${model}|${policy}`, goodput]));
  const order = placeCells().sort((a, b) => (b.goodput ?? 0) - (a.goodput ?? 0)).map((cell) => cell.policy);
  const columns = order.filter((k) => mine.some(([, policy]) => policy === k));
  element("models-title").hidden = !mine.length;
  element("models-title").textContent = `Goodput of each model at load ${state.placeLoad}, %`;
  element("models").replaceChildren(...(mine.length ? [make("thead", {}, heads("Model", "Requests", ...columns.map((k) => policies[k].name))),
    make("tbody", {}, ...unique(mine.map((row) => row[2])).map((model) => make("tr", {}, make("th", {}, model),
      make("td", {}, number(Math.max(...mine.filter((row) => row[2] === model).map((row) => row[3])), 0)),
      ...columns.map((k) => {
        const goodput = found.get(`${model}|${k}`);
        const heat = goodput === undefined ? null : `--heat:${Math.max(0, Math.min(1, 2 * (1 - goodput))).toFixed(3)}`;
        return make("td", { style: heat }, share(goodput ?? null));
      }))))] : []));
}
function showPlaceFigures() {
  const place = places[state.place], at = Number(state.placeLoad);
  const with_ = (build) => async () => build(await load(place.file), at, state.shown, placeCells());
  const metrics = Object.keys(LATENCIES);
  showModels();
  figure(element("distributions"), "profile", with_(profile));
  for (const metric of metrics) figure(element("distributions"), metric, with_((...all) => latencies(metric, ...all)));
  figure(element("work"), "decisions", with_(decisionMix));
  figure(element("work"), "bytes", with_(movedBytes));
}

/* Training. */
function showRuns() {
  legend("runs", runs.map((run, k) => [k, run]), state.runs, showTraining);
  showTraining();
}
function showTraining() {
  if (!runs.length) return;
  index.curves.forEach(([title, unit], k) => figure(element("training"), `curve-${k}`, () => learning(title, unit, state.runs), 260));
}

/* The choice stands in the address: a page that refreshes or is sent to somebody shows the same.
   What has a number in the state has its name there: with new results the numbers are others. */
const KEPT = ["platform", "family", "load", "place", "placeLoad", "shown", "runs", "episode", "left", "right", "time"];
const names = (list) => list.map(({ name }) => name);
const NAMED = { place: () => names(places), shown: () => names(policies), runs: () => names(runs),
  episode: () => spotNames(), left: () => names(policies), right: () => names(policies) };
function nameOf(key) {
  const all = NAMED[key]();
  return Array.isArray(state[key]) ? state[key].map((k) => all[k]) : all[state[key]] ?? null;
}
function numberOf(key, kept) {
  const all = NAMED[key]();
  if (Array.isArray(kept)) return kept.map((name) => all.indexOf(name)).filter((k) => k >= 0);
  return all.includes(kept) ? all.indexOf(kept) : state[key];
}
const remember = () => history.replaceState(null, "", `#${encodeURIComponent(JSON.stringify(Object.fromEntries(
  KEPT.map((key) => [key, key in NAMED ? nameOf(key) : state[key]]))))}`);
function recall() {
  try {
    const kept = JSON.parse(decodeURIComponent(location.hash.slice(1)));
    for (const key of KEPT) if (key in kept) state[key] = key in NAMED ? numberOf(key, kept[key]) : kept[key];
  } catch { /* no choice is kept there */ }
}
function showAll() {
  showFilters();
  element("fitting").hidden = !chosen().length;
  showPools();
  showVerdicts();
  showLegend();
  showFigures();
  setTimeout(showPlace); // what is further down does not hold up the verdict
}
function listen(id, event, does) {
  element(id)?.addEventListener(event, (happened) => { does(happened); remember(); });
}
for (const id of ["platform", "family", "load"]) {
  listen(id, "change", ({ target }) => { state[id] = target.value; if (id === "load") state.placeLoad = ""; showAll(); });
}
listen("place", "change", ({ target }) => { state.place = Number(target.value); state.placeLoad = ""; showPlace(); });
listen("place-load", "change", ({ target }) => { state.placeLoad = target.value; showPlace(); });
listen("all-verdicts", "click", () => { state.all = !state.all; showVerdicts(); });
function goToPlace({ place, load, policy, versus }) {
  Object.assign(state, { place, placeLoad: String(load), shown: unique([...state.shown, policy, ...(versus === null ? [] : [versus])]) });
  showLegend();
  showPlace();
  showFigures();
  remember();
  document.documentElement.style.scrollPaddingTop = `${element("legend").offsetHeight + 8}px`; // it stays above
  element("place-title").scrollIntoView();
  element("place").focus({ preventScroll: true });
}
document.addEventListener("submit", (happened) => happened.preventDefault());

/* Where `mmrl report --serve` serves this page, it says which build is the newest. */
async function follow() {
  const built = await fetch("build", { cache: "no-store" }).then((answer) => (answer.ok ? answer.text() : null)).catch(() => null);
  if (built === null) return element("served").hidden ? null : setTimeout(follow, 2000); // a plain server, or one that restarts
  element("served").hidden = false;
  follow.first ??= built;
  if (follow.first !== built) return location.reload();
  setTimeout(follow, 1000);
}
