/* The figures, each as {title, about, data, layout}; the style sheet gives text and grid their colours. */
const VERBS = {
  level100: ["load", "#2f7de1", "triangle-up"], level75: ["level ¾", "#5b97e8", "triangle-up"],
  level50: ["level ½", "#87b1ef", "triangle-up"], level25: ["level ¼", "#b3cbf5", "triangle-up"],
  level0: ["level 0", "#d3e0f8", "triangle-up"], out: ["out", "#e8710a", "triangle-down"],
  pause: ["pause", "#f5a524", "square"], resume: ["resume", "#3a9d5d", "triangle-right"],
  focus: ["focus", "#7a5af8", "diamond"],
};
const MOVED = [["weights loaded", "#2f7de1"], ["layers streamed", "#7a5af8"], ["KV saved", "#f5a524"], ["KV restored", "#3a9d5d"]];
const LATENCIES = {
  ttft_s: ["Time to first token", "seconds"], tpot_s: ["Time per output token", "seconds"],
  norm_latency: ["Normalised latency", "E2E over the latency alone"],
};
const COSTS = { loads_per_s: ["Goodput against loads", "loads per second"], ttft_p99_s: ["Goodput against tail latency", "TTFT p99, seconds"] };

function completed(layout) {
  const axis = { zeroline: false, automargin: true };
  const full = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: "system-ui, sans-serif", size: 12 },
    margin: { l: 52, r: 12, t: 10, b: 42 }, dragmode: false, showlegend: false, ...layout,
  };
  for (const name of ["xaxis", "yaxis", "xaxis2", "yaxis2"]) {
    if (name in full || !name.endsWith("2")) full[name] = { ...axis, ...full[name] };
  }
  return full;
}
const title = (text) => ({ title: { text } });
const counted = (count, noun) => `${number(count, 0)} ${noun}${count === 1 ? "" : "s"}`;
const line = (policy) => ({
  name: policy.name, meta: { policy: policy.name }, line: { color: policy.colour, width: 2, dash: policy.dash },
});
/* Policies in the order of drawing: the first one lies on top. */
const layered = (numbers) => unique(numbers).sort((a, b) => b - a);

/* Which cells may be averaged: of policies that all played in the same groups, as many as can be compared. */
function common(some, keyOf) {
  const groups = new Map();
  for (const cell of some) {
    const key = keyOf(cell);
    if (!groups.has(key)) groups.set(key, new Map());
    const group = groups.get(key);
    group.set(cell.policy, [...(group.get(cell.policy) ?? []), cell]);
  }
  const all = [...groups.values()];
  const casts = new Map(all.map((group) => [[...group.keys()].sort().join(), [...group.keys()]]));
  const choices = [...casts.values()].map((kept) => ({ kept, groups: all.filter((group) => kept.every((policy) => group.has(policy))) }));
  const compared = ({ kept, groups: where }) => (kept.length - 1) * where.length;
  const { kept, groups: same } = choices.sort((a, b) => compared(b) - compared(a) || b.groups.length - a.groups.length)[0] ?? { kept: [], groups: [] };
  const left = unique(some.map((cell) => cell.policy)).filter((policy) => !kept.includes(policy));
  return { kept, left, groups: same, total: groups.size };
}
const HIDDEN = "Who was here is hidden in the list of policies above.";
/* The mean of independent estimates; half-widths of intervals add in squares. */
function mean(some, field) {
  const values = some.filter((cell) => cell[field] !== null);
  const middle = values.reduce((sum, cell) => sum + cell[field], 0) / values.length;
  if (field !== "goodput") return [middle];
  const half = (k) => Math.sqrt(values.reduce((sum, { interval }) => sum + (interval && interval[k] !== null ? (interval[k] - interval[0]) ** 2 : 0), 0)) / values.length;
  return [middle, half(1), half(2)];
}
function whereFrom(groups, total, left, noun, only) {
  const n = groups.length, of = n < total ? ` of ${total}, where the same policies played` : "";
  const inAll = n === 1 ? `${only}${of && ` (1${of})`}. ` : `Mean of ${number(n, 0)} ${noun}${of}, taken as independent. `;
  const without = left.length ? ` Without ${left.slice(0, 3).map((k) => policies[k].name).join(", ")}${left.length > 3 ? ` and ${left.length - 3} more` : ""}: not played there.` : "";
  return [inAll, without];
}

function loadCurves(some) {
  const heading = "Goodput against load";
  const perPlace = unique(some.map((cell) => cell.place)).map((place) => [place, loadsOf(some.filter((cell) => cell.place === place))]);
  const several = perPlace.filter(([, loads]) => loads.length > 1);
  if (!several.length) {
    return { title: heading, about: "Needs results at several loads.", data: [],
      empty: !some.length ? HIDDEN : state.load === "" ? "Evaluate with --loads 0.5,0.8,1,1.3 for a curve." : "Choose all loads for a curve." };
  }
  const grids = several.map(([, loads]) => loads.join());
  const grid = grids.toSorted((a, b) => grids.filter((g) => g === b).length - grids.filter((g) => g === a).length)[0];
  const usable = new Set(several.filter(([, loads]) => loads.join() === grid).map(([place]) => place));
  const { kept, left, groups } = common(some.filter((cell) => usable.has(cell.place)), (cell) => cell.place);
  const loads = grid.split(",").map(Number);
  let count = 0;
  const data = layered(kept).map((policy) => {
    const at = loads.map((load) => mean(groups.flatMap((group) => group.get(policy).filter((cell) => cell.load === load)), "goodput"));
    count = groups.flatMap((group) => group.get(policy)).reduce((sum, cell) => sum + cell.episodes, 0);
    return {
      ...line(policies[policy]), x: loads, y: at.map(([y]) => 100 * y), mode: "lines+markers",
      error_y: { type: "data", array: at.map(([, , up]) => 100 * up), arrayminus: at.map(([, down]) => 100 * down), thickness: 1, width: 3 },
      hovertemplate: "%{y:.1f} % at load %{x}<extra>%{fullData.name}</extra>",
    };
  });
  const [inAll, without] = whereFrom(groups, perPlace.length, left, "places", places[[...groups[0].values()][0][0].place].name);
  return {
    title: heading, data,
    about: `${inAll}Mean with 95 % interval, ${counted(count, "episode")} a policy.${without}`,
    layout: { xaxis: { ...title("load (1: the slack rule reaches 90 %)"), tickvals: loads }, yaxis: title("goodput, %") },
  };
}

function pareto(some, cost) {
  const [heading, unit] = COSTS[cost];
  const { kept, left, groups, total } = common(some.filter((cell) => cell[cost] !== null && cell.goodput !== null), (cell) => `${cell.place}|${cell.load}`);
  let count = 0;
  const marks = layered(kept).map((policy) => {
    const mine = groups.flatMap((group) => group.get(policy));
    count = mine.reduce((sum, cell) => sum + cell.episodes, 0);
    const [goodput, down, up] = mean(mine, "goodput");
    return { policy, x: mean(mine, cost)[0], y: 100 * goodput, down: 100 * down, up: 100 * up };
  });
  const front = marks.filter((a) => !marks.some((b) => b.x <= a.x && b.y >= a.y && (b.x < a.x || b.y > a.y))).sort((a, b) => a.x - b.x);
  const spread = Math.max(...marks.map((mark) => mark.x)) / Math.max(1e-9, Math.min(...marks.map((mark) => mark.x)));
  const data = marks.length ? [
    { x: front.map((mark) => mark.x), y: front.map((mark) => mark.y), mode: "lines", hoverinfo: "skip",
      line: { color: "#8a94a3", width: 1, dash: "dot", shape: "hv" } },
    ...marks.map((mark) => ({
      ...line(policies[mark.policy]), x: [mark.x], y: [mark.y], mode: "markers", marker: { color: policies[mark.policy].colour, size: 10, symbol: SYMBOLS[policies[mark.policy].kind] ?? TUNED[policies[mark.policy].dash] },
      error_y: { type: "data", array: [mark.up], arrayminus: [mark.down], thickness: 1, width: 3, color: policies[mark.policy].colour },
      hovertemplate: `%{y:.1f} %, %{x:.3g} ${unit}<extra>%{fullData.name}</extra>`,
    }))] : [];
  const first = groups.length ? [...groups[0].values()][0][0] : null;
  const [inAll, without] = whereFrom(groups, total, left, "places and loads", first && `${places[first.place].name}, load ${first.load}`);
  return {
    title: heading, data, empty: some.length ? "Nobody shown has it." : HIDDEN,
    about: `${inAll}Up and left is better; dotted: nobody shown is better in both. 95 % intervals, ${counted(count, "episode")} a policy.${without}`,
    layout: { xaxis: { ...title(unit), ...(spread > 30 ? { type: "log", nticks: 5 } : { rangemode: "tozero" }) }, yaxis: title("goodput, %") },
  };
}
const SYMBOLS = { learned: "circle", live: "star", step0: "circle-open", bound: "cross" };
const TUNED = { solid: "diamond", dash: "diamond-tall", dashdot: "diamond-open", longdash: "diamond-wide" }; // rules

function profile(detail, load, shown, rows) {
  let lowest = 1, count = 0;
  const all = detail.goodput.filter(([at, , values]) => at === load && values.length);
  const mine = all.filter(([, policy]) => shown.includes(policy));
  const data = mine.sort((a, b) => b[1] - a[1]).map(([, policy, values]) => {
    lowest = Math.min(lowest, values[0]);
    count = Math.max(count, values.length);
    const x = [0, ...values, 1], n = values.length; // sorted: beyond the k-th are n - k episodes
    return { ...line(policies[policy]), x: x.map((value) => 100 * value), y: x.map((_, k) => 100 * Math.max(0, n - k) / n),
      mode: "lines", line: { ...line(policies[policy]).line, shape: "hv" }, hovertemplate: "%{y:.0f} % above %{x:.1f} %<extra>%{fullData.name}</extra>" };
  });
  return {
    title: "Performance profile", data, empty: all.length ? HIDDEN : "These results hold no single episodes.",
    about: `Share of ${counted(count || Math.max(...rows.map((row) => row.episodes)), "episode")} with more goodput than on the axis; to the right is better.`,
    layout: { xaxis: { ...title("goodput, %"), range: [100 * Math.max(0, lowest - 0.02), 100.2] }, yaxis: { ...title("episodes above, %"), range: [0, 101] } },
  };
}

function latencies(metric, detail, load, shown, rows) {
  const [heading, unit] = LATENCIES[metric];
  const known = detail.latencies.filter(([at, , name]) => at === load && name === metric);
  const mine = known.filter(([, policy]) => shown.includes(policy));
  const y = detail.quantiles.map((q) => 100 * q);
  const all = mine.flatMap(([, , , values]) => values.slice(1)).map((value) => Math.max(value, 1e-3));
  const low = Math.log10(Math.min(...all)), high = Math.log10(Math.max(...all));
  const ticks = [];
  for (let k = Math.floor(low) - 1; k <= high + 1; k++) for (const m of high - low < 2.5 ? [1, 2, 5] : [1]) ticks.push(m * 10 ** k);
  return {
    title: heading, empty: known.length ? HIDDEN : "These results hold no latencies of this kind.",
    about: `Share of requests at or below; all ${counted(Math.max(...rows.map((row) => row.requests)), "request")} of ${counted(Math.max(...rows.map((row) => row.episodes)), "episode")}. To the left is better.`,
    data: mine.sort((a, b) => b[1] - a[1]).map(([, policy, , values]) => ({
      ...line(policies[policy]), x: values.map((value) => Math.max(value, 1e-4)), y, mode: "lines",
      hovertemplate: "%{y:.0f} % within %{x:.3g}<extra>%{fullData.name}</extra>",
    })),
    layout: {
      xaxis: { ...title(unit), type: "log", tickvals: ticks, ticktext: ticks.map((tick) => tick.toLocaleString("en", { maximumFractionDigits: 4 })), range: [low - 0.05, high + 0.05] },
      yaxis: { ...title("requests, %"), range: [0, 101] },
    },
  };
}

const barsOf = (unit) => ({
  barmode: "stack", showlegend: true, bargap: 0.35, margin: { l: 52, r: 12, t: 48, b: 42 },
  legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal" },
  xaxis: title(unit), yaxis: { showgrid: false, ticks: "", ticksuffix: "  " },
});
/* The rows of a bar chart: the best policy on top. */
function ranked(detail, load, shown, rows) {
  const goodput = new Map(rows.map((row) => [row.policy, row.goodput ?? 0]));
  return detail.work.filter(([at, policy]) => at === load && shown.includes(policy)).sort((a, b) => goodput.get(a[1]) - goodput.get(b[1]));
}
function decisionMix(detail, load, shown, rows) {
  const mine = ranked(detail, load, shown, rows);
  const y = mine.map(([, policy]) => policies[policy].name);
  const data = Object.entries(VERBS).filter(([verb]) => mine.some(([, , rates]) => rates[verb])).map(([verb, [name, colour]]) => ({
    type: "bar", orientation: "h", name, y, x: mine.map(([, , rates]) => rates[verb] ?? 0), marker: { color: colour },
    hovertemplate: "%{y}: %{x:.1f} a minute<extra>%{fullData.name}</extra>",
  }));
  return { title: "Decisions", about: `Mean of ${counted(Math.max(...rows.map((row) => row.episodes)), "episode")}; waiting is left out.`,
    data, empty: mine.length ? "These results hold no decisions." : HIDDEN, height: 120 + 26 * mine.length, layout: barsOf("decisions per minute") };
}
function movedBytes(detail, load, shown, rows) {
  const mine = ranked(detail, load, shown, rows);
  const y = mine.map(([, policy]) => policies[policy].name);
  const data = MOVED.flatMap(([name, colour], k) => !mine.some(([, , , moved]) => moved[k]) ? [] : [{
    type: "bar", orientation: "h", name, y, x: mine.map(([, , , moved]) => moved[k]), marker: { color: colour },
    hovertemplate: "%{y}: %{x:.1f} GB a minute<extra>%{fullData.name}</extra>",
  }]);
  return { title: "Bytes over the link", about: `Mean of ${counted(Math.max(...rows.map((row) => row.episodes)), "episode")}, host to device and back.`,
    data, empty: mine.length ? "Nothing was moved." : HIDDEN, height: 120 + 26 * mine.length, layout: barsOf("GB per minute") };
}

async function learning(heading, unit, shown) {
  const loaded = await Promise.all(shown.filter((k) => runs[k].file).map(async (k) => [k, (await load(runs[k].file))[heading]]));
  const mine = loaded.filter(([, curve]) => curve);
  const data = mine.sort((a, b) => b[0] - a[0]).flatMap(([k, [steps, values, rule]]) => [
    ...(rule ? [{ x: steps, y: rule, mode: "lines", line: { color: runs[k].colour, width: 1.2, dash: "dot" }, hovertemplate: "%{y:.4g} at %{x:,} steps<extra>the rule of " + runs[k].name + "</extra>" }] : []),
    { x: steps, y: values, name: runs[k].name, line: { color: runs[k].colour, width: 2, dash: runs[k].dash }, marker: { size: 4 },
      mode: steps.length < 30 ? "lines+markers" : "lines", hovertemplate: "%{y:.4g} at %{x:,} steps<extra>%{fullData.name}</extra>" },
  ]);
  const lengths = mine.map(([, [steps]]) => steps.at(-1));
  const apart = Math.max(...lengths) > 5 * Math.min(...lengths); // short runs would be a smear
  return { title: heading, about: `${counted(mine.length, "run")}, one training seed each.`, data, empty: "None of these runs has logged it.",
    layout: { xaxis: { ...title("decisions in training"), ...(apart ? { type: "log", dtick: 1 } : { type: "linear", nticks: 5 }) }, yaxis: { ...title(unit), nticks: 6 } } };
}
