"""What the live node reaches on a GPU, against the limits of the machine and named peers.

Run it on a machine with a GPU:

    python benchmarks/live_node.py --out benchmarks/results/live_node.json

Each section prints its figures with the target beside them and is saved as soon as it is done. It
has a process of its own, in which the limits are measured again: what a peer leaves behind (stock
accelerate hooks, eager `generate`, transformers' continuous batching) weighs on no other section.
Models have real shapes and random weights; no files are needed.
"""

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmrl.deploy.clock import D2H
from mmrl.deploy.memory import HostArena, copy_async
from mmrl.deploy.protocol import Finish
from mmrl.deploy.rig import Rig
from mmrl.deploy.testbed import configuration
from mmrl.files import write_json
from mmrl.node.actions import LEVEL_0, LEVEL_50, LEVEL_75, LEVEL_100, OUT
from mmrl.node.state import DECODE_STEP

RESULTS: dict[str, Any] = {}
SMALL, SEVEN, FOURTEEN = "llama3.2-3b", "qwen2.5-7b", "qwen2.5-14b"
DEVICE = torch.device("cuda", 0)


def rig_of(names: list[str], memory_gb: float, **options: Any) -> Rig:
    """Open models by name in so much memory, and say how long it took."""
    rig = Rig.of(names, device="cuda", memory=int(memory_gb * 1e9), **options)
    print(f"  {', '.join(names)}: opened in {rig.opened_s:.1f} s")
    return rig


def until_tokens(rig: Rig, number: int, count: int = 1) -> None:
    """Run until a request has been answered with tokens so many times."""
    rig.until(lambda: len(rig.times[number]) >= count)


def until_out(rig: Rig) -> None:
    """Run until the first model has given back its memory."""
    rig.until(lambda: rig.node.state.granted[0] == 0)


def section(name: str) -> Callable[[Callable[[], dict[str, Any]]], Callable[[], None]]:
    def decorate(function: Callable[[], dict[str, Any]]) -> Callable[[], None]:
        def run() -> None:
            begun = time.perf_counter()
            print(f"{name}:", flush=True)
            try:
                RESULTS[name] = function()
            except Exception:
                traceback.print_exc()
                RESULTS[name] = {"error": traceback.format_exc().splitlines()[-1]}
            if name != "limits":
                RESULTS[name]["link_GBps"] = RESULTS["limits"]["link_GBps"]
            RESULTS[name]["took_s"] = time.perf_counter() - begun
            for key, value in RESULTS[name].items():
                print(f"  {key}: {value:.4g}" if isinstance(value, float) else f"  {key}: {value}")
            write_json(RESULT[0], RESULTS)
            gc.collect()
            torch.cuda.empty_cache()

        SECTIONS[name] = run
        return run

    return decorate


SECTIONS: dict[str, Callable[[], None]] = {}
RESULT = [Path("live_node.json")]


def timed(job: Callable[[], Any], repeats: int = 5) -> float:
    """Return the median seconds of a job on the device."""
    job()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        job()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def link_rate() -> float:
    """Return bytes per second from page-locked memory, in copies of 1 GiB."""
    arena = HostArena(1 << 30, page_locked=True)
    there = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    seconds = timed(lambda: copy_async(there, arena.tensor), 7)
    arena.close()
    return (1 << 30) / seconds


def memory_rate() -> float:
    """Return bytes per second, read and written, of a copy on the device."""
    a = torch.empty(4 << 30, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * (4 << 30) / timed(lambda: b.copy_(a), 7)


@section("limits")
def _() -> dict[str, Any]:
    import accelerate
    import transformers

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "link_GBps": link_rate() / 1e9,
        "memory_GBps": memory_rate() / 1e9,
    }


@section("reload")
def _() -> dict[str, Any]:
    """Load a whole model from host memory: at least .95 of the link rate."""
    out: dict[str, Any] = {}
    link = RESULTS["limits"]["link_GBps"] * 1e9
    for name in (SEVEN, FOURTEEN):
        rig = rig_of([name], 60)
        weights = sum(rig.engine.models[0].weights.piece_bytes)
        times = []
        for _ in range(5):
            times.append(rig.level(name, LEVEL_100))
            rig.act(name, OUT)
            until_out(rig)
        seconds = statistics.median(times)
        out[f"{name}_s"] = seconds
        out[f"{name}_of_link_rate (>= .95)"] = weights / seconds / link
        pairs = list(itertools.pairwise(rig.transfers))
        gaps = [(b.begun_ns - a.ended_ns) / 1e9 for a, b in pairs]
        out[f"{name}: between pieces, s"] = statistics.median(gaps)
        rig.close()
    return out


@section("streamed")
def _() -> dict[str, Any]:
    """A decode step of a 7B with layers streamed, against max(compute, bytes / link)."""
    out: dict[str, Any] = {}
    link = RESULTS["limits"]["link_GBps"] * 1e9
    rig = rig_of([SEVEN], 40)
    weights, s = rig.engine.models[0].weights, rig.node.state
    for batch in (1, 8):
        for label, verb in (("0", LEVEL_0), ("1/2", LEVEL_50), ("3/4", LEVEL_75)):
            if s.target[0] != 1 + (int(s.pieces[0] - 1) * (verb - LEVEL_0) + 3) // 4:
                rig.level(SEVEN, verb)
            numbers = [rig.submit(SEVEN, 128, 40) for _ in range(batch)]
            rig.until(partial(rig.finished, numbers))
            gaps = rig.gaps(numbers[-1], 8)
            step = statistics.median(gaps)
            missing = int(s.pieces[0] - s.target[0])
            bound = missing * weights.piece_bytes[1] / link
            out[f"batch {batch}, {label} resident: step_s"] = step
            limit = "1.05" if verb == LEVEL_0 else "1.10"
            out[f"batch {batch}, {label} resident: of the bound (<= {limit})"] = step / bound
    rig.close()
    stock = stock_offload()
    for batch in (1, 8):
        out[f"batch {batch}: stock accelerate hooks, step_s"] = stock[batch]
        ours = out[f"batch {batch}, 0 resident: step_s"]
        out[f"batch {batch}: times faster than stock (>= 6)"] = stock[batch] / ours
    return out


def stock_offload() -> dict[int, float]:
    """Return the step time of a 7B all of whose layers are offloaded by accelerate itself."""
    from accelerate import dispatch_model
    from transformers import AutoModelForCausalLM, StaticCache

    config = configuration(SEVEN)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.model.layers.to("cpu")
    where = {
        "model.embed_tokens": 0,
        "model.norm": 0,
        "model.rotary_emb": 0,
        "lm_head": 0,
        **{f"model.layers.{i}": "cpu" for i in range(config.num_hidden_layers)},
    }
    model = dispatch_model(model, where, skip_keys="past_key_values")
    times = {}
    for batch in (1, 8):
        ids = torch.ones(batch, 1, dtype=torch.long, device=DEVICE)
        cache = StaticCache(config=model.config, max_cache_len=64)

        def step(ids: Any = ids, cache: Any = cache) -> None:
            with torch.inference_mode():
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

        times[batch] = timed(step, 3)
    return times


@section("cold")
def _() -> dict[str, Any]:
    """First token of a cold 7B, prompt of 128 tokens: it computes while it loads."""
    link = RESULTS["limits"]["link_GBps"] * 1e9
    rig = rig_of([SEVEN], 40)
    weights = sum(rig.engine.models[0].weights.piece_bytes)
    times = []
    for _ in range(5):
        number = rig.submit(SEVEN, 128, 2)
        begun = time.monotonic()
        rig.act(SEVEN, LEVEL_100)
        until_tokens(rig, number)
        times.append(rig.times[number][0][0] - begun)
        rig.clear()
        rig.act(SEVEN, OUT)
        until_out(rig)
    rig.close()
    first = statistics.median(times[1:])
    return {"first_token_s": first, "of bytes / link rate (<= 1.05)": first / (weights / link)}


@section("beside")
def _() -> dict[str, Any]:
    """Decode of a resident 3B beside a streaming and a loading 7B, each between steps alone.

    Contexts grow all the while, and a step with them.
    """
    rig = rig_of([SMALL, SEVEN], 60)
    rig.level(SMALL, LEVEL_100)
    out: dict[str, Any] = {}

    def step_s() -> float:
        return statistics.median(
            step.took_s for step in rig.steps if step.model == 0 and step.kind == DECODE_STEP
        )

    def steps(during: Callable[[], bool]) -> float:
        rig.steps.clear()
        rig.until(during)
        return step_s()

    def alone() -> float:
        return steps(lambda: len(rig.steps) >= 100)

    for _ in range(8):
        rig.submit(SMALL, 256, 4000)
    rig.until(lambda: rig.node.state.decoding[0] == 8)
    ratios: dict[str, list[float]] = {"stream": [], "load": []}
    before = first = alone()
    for _ in range(3):
        rig.level(SEVEN, LEVEL_0)
        other = [rig.submit(SEVEN, 128, 5) for _ in range(2)]
        busy = steps(partial(rig.finished, other))
        out["7B's step while it streams, s"] = statistics.median(rig.gaps(other[-1], 1))
        after = alone()
        ratios["stream"].append(busy / ((before + after) / 2))
        rig.level(SEVEN, OUT)
        before = alone()
        rig.steps.clear()
        rig.level(SEVEN, LEVEL_100)
        busy = step_s()
        rig.level(SEVEN, OUT)
        after = alone()
        ratios["load"].append(busy / ((before + after) / 2))
        before = after
    rig.clear()
    rig.close()
    return {
        "alone_s": first,
        "beside a stream": statistics.median(ratios["stream"]),
        "beside a load": statistics.median(ratios["load"]),
        "both": "<= 1.1",
        **out,
    }


@section("resident")
def _() -> dict[str, Any]:
    """Decode of a resident 7B: against eager `generate`, the memory's floor, and the peer."""
    out: dict[str, Any] = {}
    rig = rig_of([SEVEN], 60)
    rig.level(SEVEN, LEVEL_100)
    memory = RESULTS["limits"]["memory_GBps"] * 1e9
    read = sum(rig.engine.models[0].weights.piece_bytes) - 152064 * 3584 * 2  # but the embeddings
    overhead = 0.0
    for batch in (1, 8, 32, 64):
        numbers = [rig.submit(SEVEN, 256, 64) for _ in range(batch)]
        begun = time.perf_counter()
        rig.until(partial(rig.finished, numbers))
        took = time.perf_counter() - begun
        # Prefills and steps alternate: a batch is whole only when the last prompt is in.
        numbers = [rig.submit(SEVEN, 256, 64 + 2 * batch) for _ in range(batch)]
        rig.until(partial(rig.finished, numbers))
        steps = [s for s in rig.steps if s.kind == DECODE_STEP and s.batch == batch]
        step = statistics.median(s.took_s for s in steps)
        gaps = [b.begun_s - a.ended_s for a, b in itertools.pairwise(steps)]
        overhead = statistics.median(gaps) / step
        kv = batch * (288 + batch) * rig.engine.models[0].pool.block_bytes / 16
        out[f"batch {batch}: step_s"] = step
        out[f"batch {batch}: of the memory's floor"] = step / ((read + kv) / memory)
        out[f"batch {batch}: between steps (<= .02)"] = overhead
        out[f"batch {batch}: tokens/s end to end"] = batch * 64 / took
        rig.clear()
    out["batch 64, of the floor"] = "<= 2.5"
    rig.close()
    out |= peers(out)
    return out


def peers(ours: dict[str, Any]) -> dict[str, Any]:
    """Run eager `generate` at batch 1 and transformers' continuous batching with 64 sequences."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = configuration(SEVEN)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    prompt = torch.full((1, 256), 20, device=DEVICE)

    def generate(tokens: int) -> None:
        model.generate(
            prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
        )

    eager = (timed(lambda: generate(65), 3) - timed(lambda: generate(1), 3)) / 64
    out = {
        "eager generate, step_s": eager,
        "times faster than eager (>= 2)": eager / ours["batch 1: step_s"],
    }
    prompts = [[20 + i % 100] * 256 for i in range(64)]
    settings = GenerationConfig(
        max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    model.generate_batch(prompts[:2], generation_config=settings)
    begun = time.perf_counter()
    answers = model.generate_batch(prompts, generation_config=settings)
    took = time.perf_counter() - begun
    tokens = sum(len(answer.generated_tokens) for answer in answers.values())
    out["continuous batching of transformers, tokens/s"] = tokens / took
    out["times its throughput (>= 3)"] = ours["batch 64: tokens/s end to end"] / (tokens / took)
    return out


@section("preempt")
def _() -> dict[str, Any]:
    """KV of a 4k-token sequence to the host and back; out and return of a running 7B."""
    link = RESULTS["limits"]["link_GBps"] * 1e9
    rig = rig_of([SEVEN], 60)
    rig.level(SEVEN, LEVEL_100)
    s, live = rig.node.state, rig.engine.models[0]
    number = rig.submit(SEVEN, 4096, 2000)
    until_tokens(rig, number, 5)
    saves, returns = [], []
    for _ in range(5):
        before = int(s.kv_save_bytes[0]), int(s.kv_restore_bytes[0])
        rig.transfers.clear()
        rig.act(SEVEN, OUT)
        rig.until(lambda: s.granted[0] == 0 and s.saved[0] == 1)
        saved = int(s.kv_save_bytes[0]) - before[0]
        (save,) = [one for one in rig.transfers if one.worker == D2H]
        saves.append(saved / ((save.ended_ns - save.begun_ns) / 1e9) / link)
        rig.act(SEVEN, LEVEL_100)
        begun = time.perf_counter()
        rig.until(lambda: s.decoding[0] == 1)
        restored = int(s.kv_restore_bytes[0]) - before[1]
        weights = sum(live.weights.piece_bytes)
        rig.until(lambda: s.landed[0] == s.pieces[0])
        returns.append((time.perf_counter() - begun) / ((weights + restored) / link))
        count = len(rig.times[number])
        until_tokens(rig, number, count + 3)
    pool, host = live.pool, rig.engine.host_kv
    rig.clear()
    direct: list[tuple[float, float]] = []
    pool.resize(10**9, 256)
    for _ in range(5):
        begun = time.perf_counter()
        host.save(pool, 10**9)
        middle = time.perf_counter()
        host.restore(pool, 10**9)
        direct.append((middle - begun, time.perf_counter() - middle))
        host.free(10**9)
    nbytes = 256 * pool.block_bytes
    pool.free(10**9)
    rig.close()
    return {
        "save, of the link rate, in the node (>= .8)": statistics.median(saves),
        "save, of the link rate, alone (>= .8)": nbytes
        / statistics.median(d[0] for d in direct)
        / link,
        "restore, of the link rate, alone (>= .8)": nbytes
        / statistics.median(d[1] for d in direct)
        / link,
        "return, of (weights + KV) / link (<= 1.10)": statistics.median(returns),
    }


@section("resplit")
def _() -> dict[str, Any]:
    """1,000 random levels while it decodes: memory on the device and the host stays as it is."""
    import random

    import psutil

    draw = random.Random(0)
    rig = rig_of([SMALL], 40)
    rig.level(SMALL, LEVEL_100)
    rig.submit(SMALL, 64, 4000)
    until_tokens(rig, 1)
    s = rig.node.state

    def acted(before: int) -> bool:
        return bool(s.actions.sum() > before)

    marks = []
    begun = time.perf_counter()
    for i in range(1000):
        verb = draw.choice([OUT, *range(LEVEL_0, LEVEL_100 + 1)])
        wanted = 0 if verb == OUT else 1 + (int(s.pieces[0] - 1) * (verb - LEVEL_0) + 3) // 4
        if wanted != s.target[0]:
            rig.act(SMALL, verb)
            rig.until(partial(acted, s.actions.sum()))
        if i % 20 == 0:  # or every iteration that waits for its bytes would be abandoned
            count = len(rig.times[1])
            if s.target[0] == 0:
                rig.level(SMALL, draw.randrange(LEVEL_0, LEVEL_100 + 1))
            until_tokens(rig, 1, count + 3)
        for _ in range(draw.randrange(4)):
            rig.engine.run_instant()
        if i % 100 == 99:
            rig.until(lambda: rig.node.state.granted[0] == rig.node.state.target[0])
            marks.append(
                (
                    torch.cuda.memory_reserved(),
                    psutil.Process().memory_info().rss,
                    rig.fleet.memory.committed_bytes,
                )
            )
        if time.perf_counter() - begun > 120:
            break
    peak = rig.fleet.memory.peak_bytes + torch.cuda.max_memory_reserved()
    tokens = len(rig.times[1])
    rig.clear()
    rig.close()
    return {
        "re-splits": i + 1,
        "tokens meanwhile": tokens,
        "host growth after the first 100, MB": (marks[-1][1] - marks[0][1]) / 1e6,
        "torch growth after the first 100, MB": (marks[-1][0] - marks[0][0]) / 1e6,
        "peak of the budget (<= 1)": peak / int(s.budget_bytes),
    }


@section("decisions")
def _() -> dict[str, Any]:
    """Latency of decisions of the champion under load, and time between iterations."""
    rig = rig_of([SMALL, SEVEN], 16, by_hand=False)
    numbers = [rig.submit((SMALL, SEVEN)[i % 2], 200, 60) for i in range(40)]
    rig.until(lambda: rig.finished(numbers), 200)
    latencies = sorted(rig.engine.decision_latencies_s)
    failed = sum(rig.times[n][-1][1].finish is not Finish.LENGTH for n in numbers)
    rig.close()
    return {
        "decisions": len(latencies),
        "p50_s": latencies[len(latencies) // 2],
        "p99_s (<= .002)": latencies[int(0.99 * (len(latencies) - 1))],
        "failed requests": failed,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT[0])
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), help="sections to run")
    arguments = parser.parse_args()
    RESULT[0] = arguments.out
    wanted = arguments.only or [name for name in SECTIONS if name != "limits"]
    if len(wanted) > 1:
        for name in wanted:
            command = [sys.executable, __file__, "--out", str(arguments.out), "--only", name]
            subprocess.run(command, check=True)
        sys.exit()
    if RESULT[0].exists():
        RESULTS.update(json.loads(RESULT[0].read_text()))
    for name in dict.fromkeys(["limits", *wanted]):
        SECTIONS[name]()
