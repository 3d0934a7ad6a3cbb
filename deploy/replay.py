"""Replay: the arrivals of a simulated episode or of a trace, sent to a live server.

Requests leave at their instants whatever the answers (an open loop), and the time of every token is
recorded; ``mmrl.deploy.replay_results`` makes of it what ``mmrl evaluate`` makes of an episode.

A request's arrival is the instant at which it is due, so that a client that falls behind cannot
hide how long its requests waited; it says by how much it was late (`Sent.lags_s`).
"""

import asyncio
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmrl.agents.windows import cut, fit, label
from mmrl.deploy.streams import Client, Outcome, Stream
from mmrl.errors import InputError, unknown
from mmrl.node.state import MAX_MODELS, Nodes, new_nodes, new_requests
from mmrl.scenarios.registry import get_scenario
from mmrl.scenarios.seeds import Split, episode_rng
from mmrl.scenarios.targets import Targets, targets_ns
from mmrl.workloads.fleet import Mapping as ModelMapping
from mmrl.workloads.fleet import fit_to_fleet
from mmrl.workloads.readers import read_trace
from mmrl.workloads.trace import Trace

LEAD_S = 0.2  # from the start to the first instant at which a request can be due
BURST = 16  # requests that are due and leave together
WATCH_S = 0.5
ALL_WINDOWS = 2**31
FIRST_TOKEN, LAST_TOKEN = 10, 250  # in every vocabulary, and seldom special
# The text of each of these in a list of JSON, all of one length: a prompt is a row of them.
_IDS = np.frombuffer(
    b"".join(b"%3d," % token for token in range(FIRST_TOKEN, LAST_TOKEN + 1)), np.uint8
).reshape(-1, 4)


@dataclass(frozen=True)
class Workload:
    """What is sent.

    Attributes:
        name: Of the board in results.
        models: The fleet, M models.
        requests: recarray[R] of REQUEST in order of arrival, none arrived; ``isolated_ns`` is 0
            where the latency alone is not known.
        duration_s: Requests arrive for so long.
        drain_s: What has not ended so long afterwards counts as unfinished.
        load: As in results; 1 for a trace as it was recorded.
        notes: What was done to get it.
        scenario: Name or path of the scenario, if there is one.
        split: Whose random streams, of an episode of a scenario.
        episode: Index of the episode, or of the window of a trace.
        trace: The window of a trace that is played on the scenario.
        trace_name: Name of the trace.
    """

    name: str
    models: tuple[str, ...]
    requests: Nodes
    duration_s: float
    drain_s: float
    load: float = 1.0
    notes: tuple[str, ...] = ()
    scenario: str = ""
    split: Split = "dev"
    episode: int = 0
    trace: Trace | None = None
    trace_name: str = ""

    @property
    def used(self) -> tuple[str, ...]:
        """Models that are asked for."""
        asked = set(self.requests["model"].tolist())
        return tuple(name for m, name in enumerate(self.models) if m in asked)


def episode_workload(
    scenario: str, split: Split, episode: int, load: float = 1.0, traces: Sequence[Path] = ()
) -> Workload:
    """Return the arrivals of an episode as the simulator plays it.

    Args:
        scenario: Name or path.
        split: Whose random streams.
        episode: Index within the split; of a trace, the number of its window.
        load: Load.
        traces: Files of a trace that is fitted to the scenario, as ``mmrl evaluate`` does.

    Raises:
        InputError: One of these is wrong.
    """
    described = get_scenario(scenario)
    sampler = described.sampler()
    trace, notes = None, [f"the arrivals of episode {split} {episode}"]
    options: dict[str, Any] = {"load": load}
    capacity = sampler.capacity
    if traces:
        fitted = fit(read_trace(list(traces)), sampler)
        windows = cut(fitted, sampler, load, ALL_WINDOWS)
        if episode >= len(windows.traces):
            raise InputError(
                f"{label(traces)} has {len(windows.traces)} windows of "
                f"{described.duration_s:g} s at load {load:g}",
                f"--episode 0 to {len(windows.traces) - 1}",
            )
        trace = windows.traces[episode]
        notes = [*windows.notes, f"window {episode} of these"]
        options = {"trace": trace}
        capacity = max(capacity, len(trace))
    node, table = new_nodes(1)[0], new_requests(1, capacity)[0]
    info = sampler.draw(episode_rng(split, episode), node, table, options)
    return Workload(
        name=", ".join([described.name, *([label(traces)] if traces else []), "live"]),
        models=info.model_names,
        requests=table[: info.requests],
        duration_s=described.duration_s,
        drain_s=described.drain_s,
        load=load,
        notes=tuple(notes),
        scenario=scenario,
        split=split,
        episode=episode,
        trace=trace,
        trace_name=label(traces) if traces else "",
    )


def trace_workload(
    files: Sequence[Path],
    served: Sequence[str],
    targets: Targets,
    drain_s: float,
    renames: Mapping[str, str] | None = None,
    mapping: ModelMapping = "auto",
) -> Workload:
    """Return the requests of a trace as they were recorded, to the models of a server.

    Args:
        files: Of one trace.
        served: Names of the server's models.
        targets: Latency targets.
        drain_s: Time after the end of the trace.
        renames: Models of the trace -> models of the server.
        mapping: How the trace's services become models, see `fit_to_fleet`.

    Raises:
        InputError: The trace is wrong or cannot be mapped; targets need the latency alone.
    """
    if targets.factor:
        raise InputError(
            f"targets '{targets.kind}' depend on the latency of a request alone, which a trace "
            "does not tell",
            "name a --scenario, or other --targets",
        )
    renames = renames or {}
    raw = _renamed(read_trace(list(files)), renames)
    _check_served([name for name in renames.values() if name not in served], served)
    known = set(raw.model_names) & set(served)
    if mapping == "names" or (mapping == "auto" and known):
        # Only the models that are asked for: a server may have many more than a node.
        fleet = [name for name in served if name in known]
        strangers = [n for n, c in zip(raw.model_names, raw.counts, strict=True) if c]
        _check_served([name for name in strangers if name not in known], served)
        trace = fit_to_fleet(raw, fleet, "names")
    else:
        trace = fit_to_fleet(raw, served[:MAX_MODELS], mapping)
    if len(trace.model_names) > MAX_MODELS:
        raise InputError(
            f"the trace asks for {len(trace.model_names)} models, {MAX_MODELS} are the most",
            "map several to one: --map",
        )
    table = new_requests(1, len(trace))[0]
    table["arrival_ns"], table["model"] = trace.arrival_ns, trace.model
    table["prompt"], table["output"] = trace.prompt_tokens, trace.output_tokens
    table["first_ns"] = table["finish_ns"] = -1
    numbers = targets.numbers
    for row, batch_work in zip(table, trace.batch_work.tolist(), strict=True):
        ttft_ns, tpot_ns = targets_ns(numbers, row["prompt"], 0.0, 0.0)
        row["ttft_ns"] = numbers.batch_ttft_ns if batch_work else ttft_ns
        row["tpot_ns"] = 0 if batch_work else tpot_ns
    return Workload(
        name=f"{label(files)}, live",
        models=trace.model_names,
        requests=table,
        duration_s=trace.duration_s,
        drain_s=drain_s,
        notes=(*trace.notes, f"targets: {targets.describe()}"),
        trace_name=label(files),
    )


def stretched(workload: Workload, time_scale: float) -> Workload:
    """Return a workload with its arrivals spread over ``time_scale`` times as long.

    Raises:
        InputError: That is not a positive number.
    """
    if not 0 < time_scale < np.inf:
        raise InputError(f"time scale is {time_scale:g}, not a positive number")
    if time_scale == 1:
        return workload
    requests = workload.requests.copy()
    requests["arrival_ns"] = np.floor(requests["arrival_ns"] * time_scale)
    return replace(
        workload,
        requests=requests,
        duration_s=workload.duration_s * time_scale,
        notes=(*workload.notes, f"time x {time_scale:g}"),
    )


def served_names(
    workload: Workload, served: Sequence[str], renames: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the server's name for each model that is asked for: the same unless renamed.

    Raises:
        InputError: The server has no such model, or a renamed one is not of the fleet.
    """
    renames = renames or {}
    for name in renames:
        if name not in workload.models:
            raise unknown("model in --map", name, workload.models)
    found = {name: renames.get(name, name) for name in workload.used}
    _check_served([name for name in found.values() if name not in served], served)
    return found


# --- sending --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """How far a run is: requests that are open and that ended, and tokens that came."""

    elapsed_s: float
    total_s: float
    open: int
    ended: dict[Outcome, int]
    tokens: int


Watch = Callable[[Progress], None]


@dataclass
class Sent:
    """What came of a run.

    Attributes:
        workload: What was sent.
        served: The server's name of each model.
        streams: One per request, in the order of the workload.
        start_ns: Instant zero, of ``time.monotonic_ns``.
        end_ns: End of the episode: all requests have ended, or the time was over.
        interrupted: Whether it was stopped before.
        counters: What the server counted, as text: when the warm-up was over, and at the end;
            empty where it does not tell.
        warmup_s: How long the warm-up was, whose requests no figure counts.
    """

    workload: Workload
    served: dict[str, str]
    streams: list[Stream] = field(default_factory=list)
    start_ns: int = 0
    end_ns: int = 0
    interrupted: bool = False
    counters: tuple[str, str] = ("", "")
    warmup_s: float = 0.0

    @property
    def outcomes(self) -> dict[Outcome, int]:
        """How many requests came to each end."""
        found = dict.fromkeys(Outcome, 0)
        for stream in self.streams:
            found[stream.outcome] += 1
        return found

    @property
    def lags_s(self) -> npt.NDArray[np.float64]:
        """By how much this client was late with each request it began, float64[n] seconds."""
        begun_ns = np.array([stream.begun_ns for stream in self.streams], np.int64)
        due_ns = self.start_ns + self.workload.requests["arrival_ns"]
        lags: npt.NDArray[np.float64] = (begun_ns - due_ns)[begun_ns >= 0] * 1e-9
        return lags

    @property
    def connecting_s(self) -> npt.NDArray[np.float64]:
        """How long each request that was sent had to wait for a connection, float64[n] seconds."""
        waits_ns = [s.sent_ns - s.begun_ns for s in self.streams if s.sent_ns >= 0]
        return np.array(waits_ns, np.float64) * 1e-9


async def send(
    workload: Workload,
    served: Mapping[str, str],
    client: Client,
    seed: int = 0,
    warmup_s: float = 0.0,
    watch: Watch | None = None,
) -> Sent:
    """Send the requests at their instants and follow the answers to the end of the episode.

    The end is that of a simulated one: when all requests have ended, or ``drain_s`` after
    ``duration_s``; streams that are open then are closed, which tells the server to stop. When
    this is cancelled (Ctrl-C) it returns what there is.

    Args:
        workload: What to send.
        served: The server's name of each model, see `served_names`.
        client: The server.
        seed: Of the token ids in prompts.
        warmup_s: How much of the start is warm-up.
        watch: Told of progress, some times a second.
    """
    requests = workload.requests
    run = Sent(workload, dict(served), [Stream() for _ in requests], warmup_s=warmup_s)
    names = [run.served.get(name, "") for name in workload.models]
    # Whatever has been imported is never garbage: a full collection would stop all streams.
    gc.collect()
    gc.freeze()
    run.start_ns = time.monotonic_ns() + round(LEAD_S * 1e9)
    horizon_ns = run.start_ns + round((workload.duration_s + workload.drain_s) * 1e9)
    tally = _Tally()
    before = asyncio.create_task(_counters(client, LEAD_S + warmup_s if warmup_s else 0.0))
    watching = asyncio.create_task(_watched(run, tally, watch)) if watch else None
    try:
        for i, stream in enumerate(run.streams):
            request = requests[i]
            body = request_body(
                names[request["model"]], int(request["prompt"]), int(request["output"]), (seed, i)
            )
            due_ns = run.start_ns + int(request["arrival_ns"])
            left_s = (due_ns - time.monotonic_ns()) * 1e-9
            # In a burst some leave together: between two turns, the loop serves all streams.
            if left_s > 0 or i % BURST == 0:
                await asyncio.sleep(max(0.0, left_s))
            tally.follow(asyncio.create_task(client.complete(body, stream)), stream)
        if tally.open:
            left_s = (horizon_ns - time.monotonic_ns()) * 1e-9
            await asyncio.wait(set(tally.open), timeout=max(0.0, left_s))
    except asyncio.CancelledError:
        run.interrupted = True
    finally:
        pending = [*tally.open, *([watching] if watching else [])]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        run.end_ns = time.monotonic_ns()  # no chunk came later
        gc.unfreeze()
        if before.done():
            run.counters = before.result(), await client.metrics()
        before.cancel()
        client.close()
    return run


def request_body(model: str, prompt: int, output: int, seed: tuple[int, int]) -> bytes:
    """Return the JSON of one request: a prompt of random tokens, exactly ``output`` to generate.

    Args:
        model: The server's name of the model.
        prompt: Tokens of the prompt.
        output: Tokens to generate.
        seed: Of the run, and the request's number: no two prompts begin alike.
    """
    ids = np.random.default_rng(seed).integers(0, len(_IDS), prompt)
    settings = {
        "model": model,
        "max_tokens": output,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    head = json.dumps(settings)[:-1].encode()
    return head + b', "prompt": [' + _IDS[ids].tobytes()[:-1] + b"]}"


async def _counters(client: Client, after_s: float) -> str:
    await asyncio.sleep(after_s)
    return await client.metrics()


class _Tally:
    """Counts as streams end, so that to look costs no more than there are open ones."""

    def __init__(self) -> None:
        self.open: dict[asyncio.Task[None], Stream] = {}
        self.ended = dict.fromkeys(Outcome, 0)
        self._tokens = 0

    def follow(self, task: "asyncio.Task[None]", stream: Stream) -> None:
        self.open[task] = stream
        task.add_done_callback(self._end)

    def _end(self, task: "asyncio.Task[None]") -> None:
        stream = self.open.pop(task)
        self.ended[stream.outcome] += 1
        self._tokens += stream.tokens

    @property
    def tokens(self) -> int:
        return self._tokens + sum(stream.tokens for stream in self.open.values())


async def _watched(run: Sent, tally: _Tally, watch: Watch) -> None:
    total_s = run.workload.duration_s + run.workload.drain_s
    while True:
        elapsed_s = max(0.0, (time.monotonic_ns() - run.start_ns) * 1e-9)
        watch(Progress(elapsed_s, total_s, len(tally.open), dict(tally.ended), tally.tokens))
        await asyncio.sleep(WATCH_S)


def _check_served(missing: Sequence[str], served: Sequence[str]) -> None:
    if missing:
        raise InputError(
            f"the server has no model '{missing[0]}'",
            f"map it: --map '{missing[0]}=...'; served: {', '.join(served) or 'none'}",
        )


def _renamed(trace: Trace, renames: Mapping[str, str]) -> Trace:
    """Return a trace with other names of its models; those that get the same name are one."""
    for name in renames:
        if name not in trace.model_names:
            raise unknown("model in --map", name, trace.model_names)
    renamed = [renames.get(name, name) for name in trace.model_names]
    names = tuple(dict.fromkeys(renamed))
    index = np.array([names.index(name) for name in renamed], np.int32)
    return replace(trace, model=index[trace.model], model_names=names)
