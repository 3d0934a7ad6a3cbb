"""Policies in turn on one live server, on the same requests, beside the simulator's prediction.

    mmrl serve benchmarks/headline_node.toml                 # the fleet of benchmarks/headline.toml
    python benchmarks/headline.py --url http://127.0.0.1:8000 --out runs/headline
    python benchmarks/headline.py --out runs/headline        # the table and figure again, anywhere

Each repeat is another test episode of the scenario; within it every policy gets the same requests
at the same instants, in an order that is turned round from one repeat to the next. What is finished
is kept: the same command goes on, and two nodes may take a repeat each (``--repeats 0``). The node
simulated beside sets as much memory apart as the server measured. Intervals resample blocks of ten
seconds of arrivals, the same blocks for all policies, since what happens to requests that come
together is not independent.
"""

import argparse
import os
import re
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mmrl.files import atomic_write, write_json
from mmrl.node.state import new_nodes, new_requests
from mmrl.scenarios.registry import get_scenario
from mmrl.scenarios.seeds import episode_rng
from mmrl.stats import Interval, bootstrap

SCENARIO = Path(__file__).with_name("headline.toml")
POLICIES = ("full-swap", "lru", "slack", "default")
BLOCK_S = 10.0
METRICS = ("goodput", "norm_latency", "ttft_p50_s", "ttft_p99_s", "loads_per_s", "longest_wait_s")
RUN = "run-{repeat}-{policy}"
LIVE = "live"
RULE_COLOR, LEARNED_COLOR = "#8fa3bf", "#2f7de1"


def scenario_like(url: str, folder: Path) -> Path:
    """Write the scenario with the memory that a server has to give, and return the file.

    A server measures what it sets apart of its budget; the simulator adds it up from the profiles.
    """
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        found = re.search(r"^mmrl_memory_reserve_bytes (\S+)", answer.read().decode(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"{url} does not say what memory it sets apart: is it mmrl serve?")
    sampler = get_scenario(SCENARIO).sampler()
    node = new_nodes(1)[0]
    sampler.draw(episode_rng("test", 0), node, new_requests(1, sampler.capacity)[0])
    apart_gb, foreseen_gb = float(found[1]) / 1e9, int(node["reserve_bytes"]) / 1e9
    budget_gb = int(node["budget_bytes"]) / 1e9 + foreseen_gb - apart_gb
    print(f"the server sets {apart_gb:.2f} GB apart; the profiles add up to {foreseen_gb:.2f} GB")
    text = re.sub(r"(?m)^budget_gb = .*$", f"budget_gb = {budget_gb:.3f}", SCENARIO.read_text())
    with atomic_write(folder / SCENARIO.name) as file:
        file.write(text)
    return folder / SCENARIO.name


def serve(url: str, policy: str, repeat: int, scenario: Path, folder: Path) -> None:
    """Let a policy serve an episode, and simulate it on the same arrivals."""
    key = os.environ.get("MMRL_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    change = urllib.request.Request(f"{url}/admin/policy/{policy}", b"", headers, method="POST")
    with urllib.request.urlopen(change, timeout=60):
        pass
    main = "import sys; sys.argv[0] = 'mmrl'; from mmrl.cli.app import main; main()"
    command = [sys.executable, "-c", main, "replay", "--url", url, "--scenario", str(scenario)]
    command += ["--split", "test", "--episode", str(repeat), "--simulate", policy]
    subprocess.run([*command, "--name", LIVE, "--out", str(folder)], check=True)


def read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return all live requests, and the metrics of each run, live and simulated."""
    requests, runs = [], []
    for path in sorted(folder.glob(RUN.format(repeat="*", policy="*"))):
        _, repeat, policy = path.name.split("-", 2)
        about: dict[str, Any] = {"policy": policy, "repeat": int(repeat)}
        requests.append(pd.read_parquet(path / "requests.parquet").assign(**about))
        for row in pd.read_parquet(path / "episodes.parquet").to_dict("records"):
            values = {name: row[name] for name in METRICS}
            runs.append(about | {"live": row["policy"] == LIVE} | values)
    if not runs:
        raise SystemExit(f"{folder} holds no runs: name a server with --url")
    return pd.concat(requests), pd.DataFrame(runs)


def silence_s(requests: pd.DataFrame, policy: str) -> float:
    """Return the longest time of a policy's runs in which nobody got a token, s."""
    runs = requests[requests.policy == policy].groupby("repeat").chunk_s
    return max(float(np.diff(np.sort(np.concatenate(list(run)))).max()) for _, run in runs)


def blocks(requests: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return requests and good ones, a row per block of arrivals and a column per policy."""
    block = (requests.scheduled_s // BLOCK_S).astype(int)
    good = requests.groupby([requests.repeat, block, requests.policy]).good
    # Of a repeat that is not done by all, nothing.
    return good.size().unstack("policy").dropna(), good.sum().unstack("policy").dropna()


def table(requests: pd.DataFrame, runs: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a row per policy: live and simulated, and the learned one's lead over it."""
    counts, good = blocks(requests)
    index = [np.arange(len(counts))]

    def share(policy: str, rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(np.int64)
        n, met = counts[policy].to_numpy()[rows], good[policy].to_numpy()[rows]
        return np.asarray(met.sum(-1) / n.sum(-1))

    def lead(policy: str, over: str, rows: np.ndarray) -> np.ndarray:
        return np.asarray(share(policy, rows) - share(over, rows))

    order = [name for name in runs.policy.unique() if name in counts]
    learned = next((name for name in order if name not in POLICIES[:3]), None)
    rows = []
    for policy in order:
        mine = runs[runs.policy == policy].groupby("live")[list(METRICS)].mean()
        row: dict[str, Any] = {
            "policy": policy,
            "requests": int(counts[policy].sum()),
            "live": mine.loc[True].to_dict(),
            "simulated": mine.loc[False].to_dict(),
            "longest_silence_s": silence_s(requests, policy),
            "goodput": bootstrap(index, partial(share, policy)),
        }
        if learned is not None and learned != policy:
            row["learned_leads_by"] = bootstrap(index, partial(lead, learned, policy))
        rows.append(row)
    return sorted(rows, key=lambda row: row["goodput"].estimate)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the figure: goodput and latency of each policy, live with intervals and simulated."""
    from plotly.subplots import make_subplots

    rules = POLICIES[:-1]
    names = [row["policy"] if row["policy"] in rules else "learned" for row in rows]
    colors = [RULE_COLOR if name in rules else LEARNED_COLOR for name in names]
    figure = make_subplots(1, 2, subplot_titles=("Goodput, %", "Normalised latency"))
    panels = (
        ("goodput", 100, [_around(row["goodput"]) for row in rows]),
        ("norm_latency", 1, None),
    )
    for column, (metric, unit, whiskers) in enumerate(panels, start=1):
        values = [unit * row["live"][metric] for row in rows]
        if whiskers:
            values = [unit * row[metric].estimate for row in rows]
        figure.add_bar(
            x=names,
            y=values,
            error_y=whiskers
            and {"array": [u for u, _ in whiskers], "arrayminus": [d for _, d in whiskers]},
            text=[f"{value:.1f}" for value in values],
            textposition="inside",
            insidetextanchor="start",
            marker_color=colors,
            showlegend=False,
            row=1,
            col=column,
        )
        figure.add_scatter(
            x=names,
            y=[unit * row["simulated"][metric] for row in rows],
            mode="markers",
            marker={"symbol": "diamond", "size": 11, "color": "#e8710a"},
            name="foreseen by the simulator",
            showlegend=column == 1,
            row=1,
            col=column,
        )
    figure.update_layout(
        template="plotly_white",
        width=1000,
        height=380,
        margin={"t": 50, "b": 20, "l": 40, "r": 20},
        legend={"orientation": "h", "y": -0.12},
    )
    figure.write_html(path, include_plotlyjs=True, config={"displayModeBar": False})


def _around(interval: Interval) -> tuple[float, float]:
    """Return how far an interval of shares reaches up and down, in points."""
    estimate, low, high = (100 * each for each in interval)
    return high - estimate, estimate - low


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="of the server; none: only the table and figure")
    parser.add_argument("--out", type=Path, default=Path("runs/headline"))
    parser.add_argument("--repeats", type=int, nargs="+", default=(0, 1), help="test episodes")
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    arguments = parser.parse_args()
    url = (arguments.url or "").rstrip("/")
    for repeat in arguments.repeats if url else ():
        scenario = scenario_like(url, arguments.out / f"node-{repeat}")
        for policy in arguments.policies[:: -1 if repeat % 2 else 1]:
            folder = arguments.out / RUN.format(repeat=repeat, policy=policy)
            if not (folder / "summary.json").exists():
                serve(url, policy, repeat, scenario, folder)
    found = table(*read(arguments.out))
    for row in found:
        low, high = (100 * bound for bound in row["goodput"][1:])
        live, simulated = row["live"], row["simulated"]
        print(
            f"{row['policy']:12s} goodput {100 * row['goodput'].estimate:5.1f} % "
            f"[{low:.1f}, {high:.1f}] (simulated {100 * simulated['goodput']:.1f}), "
            f"normalised latency {live['norm_latency']:.1f} ({simulated['norm_latency']:.1f}), "
            f"TTFT p99 {live['ttft_p99_s']:.1f} s ({simulated['ttft_p99_s']:.1f}), "
            f"loads/s {live['loads_per_s']:.2f} ({simulated['loads_per_s']:.2f}), "
            f"nobody got a token for {row['longest_silence_s']:.1f} s at most"
        )
        if "learned_leads_by" in row:
            lead, low, high = (100 * each for each in row["learned_leads_by"])
            print(f"{'':12s} the learned policy leads by {lead:.1f} [{low:.1f}, {high:.1f}] points")
    write_json(arguments.out / "headline.json", found)
    draw(found, arguments.out / "headline.html")
