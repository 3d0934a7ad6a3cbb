/* One episode under two policies: residency, queues and decisions, and what was decided at an instant. */
const SIDES = ["left", "right"];
const spots = unique(episodes.map((entry) => `${entry.place}|${entry.load}|${entry.episode}`));
const spotNames = () => spots.map((_, k) => episodes.find((entry) => spotOf(entry) === k))
  .map(({ place, load, episode }) => `${places[place].name}, load ${load}: ${episode}`);
const spotOf = (entry) => spots.indexOf(`${entry.place}|${entry.load}|${entry.episode}`);
const recordedHere = () => episodes.filter((entry) => spotOf(entry) === state.episode);
const sideEntry = (side) => recordedHere().find((entry) => entry.policy === state[side]);
let playing = {}; // side -> what was recorded

function showEpisodes() {
  if (!(state.episode in spots)) state.episode = 0;
  const here = recordedHere();
  if (!sideEntry("left")) state.left = here[0].policy;
  if (!sideEntry("right")) state.right = bestOther(here);
  const first = spots.map((_, k) => episodes.find((entry) => spotOf(entry) === k));
  options(element("episode"), first.map((entry, k) => [String(k),
    `${places[entry.place].name}, load ${entry.load}: ${entry.episode}${entry.why ? ` (${entry.why})` : ""}`]), state.episode);
  for (const side of SIDES) {
    options(element(side), here.map(({ policy }) => [String(policy), policies[policy].name]), state[side] ?? "");
  }
  const { place, load, episode, why } = here[0];
  element("episode-about").textContent = `Episode ${episode} of ${places[place].name} at load ${load}${why ? `: ${why}` : ""}. `
    + `One episode says little about a policy; the tables above say how often it goes this way.`;
  showSides();
}
/* Beside the first policy stands the best rule of the place, if it was recorded. */
function bestOther(here) {
  const others = here.map(({ policy }) => policy).filter((policy) => policy !== state.left);
  const best = cells.find((cell) => cell.best && cell.place === here[0].place && cell.load === here[0].load);
  return others.includes(best?.policy) ? best.policy : others[0] ?? null;
}
async function showSides() {
  const wanted = SIDES.map(sideEntry);
  playing = {};
  const loaded = await Promise.all(wanted.map((entry) => (entry ? load(entry.file).catch(() => null) : null)));
  if (SIDES.some((side, k) => sideEntry(side) !== wanted[k])) return; // chosen anew meanwhile
  SIDES.forEach((side, k) => { if (loaded[k]) playing[side] = loaded[k]; });
  const all = Object.values(playing);
  const end = Math.max(0, ...all.map((recorded) => recorded.end_s));
  element("time").max = end;
  if (state.time === null || state.time > end) state.time = Math.min(...instants().departures, ...instants().actions, end);
  const scale = { end, waiting: Math.max(1, ...all.flatMap((recorded) => recorded.waiting)),
    queue: Math.max(1, ...all.flatMap((recorded) => (recorded.queues ?? []).flatMap(([, counts]) => counts))) };
  for (const side of SIDES) {
    const entry = sideEntry(side);
    const node = figure(element("timelines"), `timeline-${side}`, async () => {
      const recorded = entry && await load(entry.file);
      return recorded ? timeline(side, entry, recorded, scale) : { title: "", about: "", data: [] };
    }, 190 + 44 * (playing[side]?.models.length ?? 3));
    node.hidden = !entry;
    if (!node.querySelector(".decision")) node.append(make("div", { class: "decision", "aria-live": "polite", id: `decision-${side}` }));
  }
  showInstant();
}

function actionOf(recorded, action) {
  if (action === 0) return { text: "wait", verb: null, model: null };
  const { verbs } = recorded.decisions;
  const model = Math.floor((action - 1) / verbs.length), verb = verbs[(action - 1) % verbs.length];
  return { text: `${VERBS[verb][0]} ${recorded.models[model]}`, verb, model };
}
const departs = ({ decisions }, k) => Boolean(decisions.champion) && decisions.champion[k] !== decisions.action[k];

function timeline(side, entry, recorded, scale) {
  const policy = policies[entry.policy], { models, decisions } = recorded;
  const styles = {
    resident: { color: policy.colour }, partial: { color: policy.colour, opacity: 0.5 },
    loading: { color: "rgba(0,0,0,0)", line: { color: policy.colour, width: 1 },
      pattern: { shape: "/", fgcolor: policy.colour, size: 5, solidity: 0.4 } },
  };
  const data = Object.entries(styles).flatMap(([name, marker]) => {
    const spans = recorded.spans.filter(([, , , kind]) => kind === name);
    return spans.length ? [{
      type: "bar", orientation: "h", marker, width: 0.46, customdata: spans.map(([m]) => models[m]),
      y: spans.map(([m]) => m + 0.2), x: spans.map(([, from, to]) => to - from), base: spans.map(([, from]) => from),
      hovertemplate: `%{customdata} ${name}, from %{base:.1f} s<extra></extra>`,
    }] : [];
  });
  if (recorded.queues) data.push(queues(recorded, scale));
  if (decisions) data.push(...marks(recorded));
  data.push({
    x: recorded.times_s, y: recorded.waiting, yaxis: "y2", mode: "lines", fill: "tozeroy", fillcolor: "rgba(138,148,163,.35)",
    line: { color: "#8a94a3", width: 1.2, shape: "hv" }, hovertemplate: "%{y} waiting at %{x:.1f} s<extra></extra>",
  });
  const used = decisions ? unique(decisions.action.filter((action) => action).map((action) => actionOf(recorded, action).verb)) : [];
  const signs = { "triangle-up": "▲", "triangle-down": "▼", square: "■", "triangle-right": "▶", diamond: "◆" };
  const key = used.map((verb) => `${signs[VERBS[verb][2]]} ${VERBS[verb][0]}`).join(", ");
  const departures = decisions?.champion ? "; ringed where the champion would do something else" : "";
  return {
    title: policy.name, data,
    about: `Bars: on the device, hatched while loading. Grey: requests that wait for a first token, of each model and below of all.`
      + (key ? ` Marks: ${key}${departures}.` : "") + " One episode.",
    layout: {
      barmode: "overlay", uirevision: entry.file, dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false,
      xaxis: { ...title("seconds"), range: [0, scale.end], anchor: "y2" },
      yaxis: { domain: [0.26, 1], range: [models.length - 0.45, -0.62], tickvals: models.map((_, m) => m), ticktext: models.map((name) => `${name}  `), showgrid: false, fixedrange: true },
      yaxis2: { ...title("waiting"), domain: [0, 0.2], range: [0, 1.05 * scale.waiting], fixedrange: true, nticks: 3 },
      shapes: [{ type: "line", yref: "paper", x0: state.time, x1: state.time, y0: 0, y1: 1, line: { color: "#d92d20", width: 1 } }],
    },
    after: (plot) => {
      if (plot.dataset.listens) return;
      plot.dataset.listens = true;
      plot.on("plotly_click", ({ points: [point] }) => { if (point.data.meta?.marks) goTo(point.x); });
    },
  };
}
/* How many requests of each model wait, above its bar: one outline of all models, with gaps. */
function queues({ queues, models }, scale) {
  const x = [], y = [];
  queues.forEach(([times, counts], m) => {
    const base = m - 0.07, height = (count) => base - 0.4 * count / scale.queue;
    x.push(times[0]);
    y.push(base);
    for (let k = 0; k < times.length; k++) {
      if (k > 0) { x.push(times[k]); y.push(height(counts[k - 1])); }
      x.push(times[k]);
      y.push(height(counts[k]));
    }
    x.push(times.at(-1), times[0], null);
    y.push(base, base, null);
  });
  return { x, y, mode: "lines", fill: "toself", fillcolor: "rgba(138,148,163,.55)", line: { width: 0 }, hoverinfo: "skip", name: models.join() };
}
function marks(recorded) {
  const { time_s, action } = recorded.decisions;
  const acted = action.map((_, k) => k).filter((k) => action[k] !== 0);
  const what = acted.map((k) => actionOf(recorded, action[k]));
  const ringed = action.map((_, k) => k).filter((k) => departs(recorded, k));
  const lane = (k) => {
    const { model } = actionOf(recorded, action[k] || recorded.decisions.champion[k]);
    return model + 0.2;
  };
  const text = (k) => `${actionOf(recorded, action[k]).text}; the champion: ${actionOf(recorded, recorded.decisions.champion[k]).text}`;
  return [
    { x: acted.map((k) => time_s[k]), y: what.map(({ model }) => model + 0.2), mode: "markers", meta: { marks: true },
      marker: { symbol: what.map(({ verb }) => VERBS[verb][2]), color: "#fff", size: 6, line: { color: "#1c2430", width: 1 } },
      text: what.map(({ text }) => text), hovertemplate: "%{text} at %{x:.2f} s<extra></extra>" },
    { x: ringed.map((k) => time_s[k]), y: ringed.map(lane), mode: "markers", meta: { marks: true },
      marker: { symbol: "circle-open", color: "#d92d20", size: 9, line: { width: 1 } },
      text: ringed.map(text), hovertemplate: "%{text}, at %{x:.2f} s<extra></extra>" },
  ];
}

/* The decision that stands at an instant: of several at the same time, the one that did something. */
function decisionAt({ decisions }, time) {
  let last = -1;
  for (let k = 0; k < decisions.time_s.length && decisions.time_s[k] <= time + 1e-9; k++) last = k;
  const same = decisions.time_s.map((_, k) => k).filter((k) => decisions.time_s[k] === decisions.time_s[last]);
  return same.find((k) => decisions.action[k] !== 0) ?? last;
}
function showInstant() {
  element("time").value = state.time;
  element("instant").textContent = `${number(Number(state.time), 2)} s`;
  for (const side of SIDES) {
    const panel = element(`decision-${side}`), recorded = playing[side];
    if (!panel || !recorded) continue;
    panel.replaceChildren(...(recorded.decisions ? decision(recorded, policies[state[side]])
      : [make("p", { class: "note" }, "The decisions of this episode were not recorded: evaluate again.")]));
    const plot = document.querySelector(`[data-figure="timeline-${side}"] .plot`);
    if (plot?._fullLayout?.shapes?.length) window.Plotly.relayout(plot, { "shapes[0].x0": state.time, "shapes[0].x1": state.time });
  }
  const { actions, departures } = instants();
  element("previous").disabled = !actions.some((at) => at < state.time - 1e-6);
  element("next").disabled = !actions.some((at) => at > state.time + 1e-6);
  element("departure").hidden = !departures.length;
  element("departure").disabled = !departures.some((at) => at > state.time + 1e-6);
}
function decision(recorded, policy) {
  const { decisions } = recorded, k = decisionAt(recorded, state.time);
  if (k < 0) return [make("p", { class: "note" }, "Nothing was decided yet.")];
  const taken = actionOf(recorded, decisions.action[k]).text;
  const line = make("p", {}, make("b", {}, taken), ` at ${number(decisions.time_s[k], 2)} s`);
  if (decisions.champion) {
    const champion = actionOf(recorded, decisions.champion[k]).text;
    line.append(departs(recorded, k) ? make("span", { class: "departs" }, `; the champion: ${champion}`) : "; as the champion");
  }
  const chances = (decisions.likeliest?.[k] ?? []).map(([action, chance]) => {
    const fill = make("i", { style: `width:${(100 * chance).toFixed(1)}%;background:${policy.colour}` });
    return make("div", { class: action === decisions.action[k] ? "chance taken" : "chance" }, make("span", {}, actionOf(recorded, action).text),
      make("span", { class: "bar" }, fill), make("data", { value: chance }, `${(100 * chance).toFixed(chance < 0.0995 ? 1 : 0)} %`));
  });
  return [line, ...chances];
}
/* When either policy does something, and when one departs from the champion. */
function instants() {
  const found = { actions: [], departures: [] };
  for (const recorded of Object.values(playing)) {
    recorded.decisions?.time_s.forEach((at, k) => {
      if (recorded.decisions.action[k] !== 0) found.actions.push(at);
      if (departs(recorded, k)) found.departures.push(at);
    });
  }
  return found;
}
function goTo(time) {
  state.time = time;
  remember();
  showInstant();
}
const after = (times) => Math.min(...times.filter((at) => at > state.time + 1e-6));
listen("episode", "change", ({ target }) => { Object.assign(state, { episode: Number(target.value), left: null, right: null, time: null }); showEpisodes(); });
for (const side of SIDES) listen(side, "change", ({ target }) => { state[side] = Number(target.value); showSides(); });
listen("time", "input", ({ target }) => { state.time = Number(target.value); showInstant(); });
listen("previous", "click", () => goTo(Math.max(...instants().actions.filter((at) => at < state.time - 1e-6))));
listen("next", "click", () => goTo(after(instants().actions)));
listen("departure", "click", () => goTo(after(instants().departures)));

recall();
if (places.length) showAll();
setTimeout(() => {
  showRuns();
  if (episodes.length) showEpisodes();
});
if (location.protocol.startsWith("http")) follow();
