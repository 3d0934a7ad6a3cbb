"""`measure`: runs of the live node, one for each policy and load, each in a file of its own.

The fleet is opened once. Each run has a fresh state, engine and clock over the same weights, pools
and graphs, and requests arrive open loop: at their instants, whatever the answers.
"""

import functools
import gc
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmrl.agents.export import (
    BEST,
    DEFAULT,
    DEFAULT_FOLDER,
    DESCRIPTION,
    WEIGHTS,
    ExportedPolicy,
)
from mmrl.agents.provenance import provenance
from mmrl.deploy.adapter import DeployAdapter
from mmrl.deploy.clock import RealTime, SimulatedTime
from mmrl.deploy.config import ServeConfig, build_config, read_models
from mmrl.deploy.engine import Engine
from mmrl.deploy.fleet import Fleet, Progress, find_policy, open_fleet
from mmrl.deploy.hardware import device_name
from mmrl.deploy.node import CAPACITY, LiveNode, NodeNumbers
from mmrl.deploy.protocol import Finish, Generate, Sampling, Tokens
from mmrl.deploy.rig import Hands, open_checkpoints
from mmrl.deploy.validate.rate import sustainable_rate
from mmrl.deploy.validate.record import (
    REQUEST_FIELDS,
    RecordedNode,
    Recording,
    header_of,
    numbers_of,
)
from mmrl.errors import InputError, MmrlError
from mmrl.files import refuse_foreign, write_json
from mmrl.node.state import IDLE, LINK_IDLE, MISS_REFUSED, REFUSED
from mmrl.rules import Rule, get_rule
from mmrl.workloads.generators import ArrivalSpec, LengthSpec, WorkloadSpec, sample_trace
from mmrl.workloads.trace import Trace

PLAN = "plan.json"
POLICIES = "policies"  # copies of the trained ones, in the folder of the runs
MOST_TOKENS = 4096  # of prompt and output together, or what the models' contexts allow
BURSTS = ArrivalSpec.model_validate({"kind": "gamma", "cv": 2.0})
DURATION_S, DRAIN_S = 60.0, 15.0
REST_S = 60.0  # in which a node comes to rest after a run
Says = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """Which runs to make.

    Attributes:
        config: The fleet and its node; its policy is not looked at, nor what it pins or preloads.
        policies: Rules, or folders of trained policies.
        loads: 1 is where the champion reaches a goodput of .90 in the simulator.
        duration_s: Requests arrive for so long.
        seed: Of arrivals and lengths.
        rate_per_s: Requests per second at load 1; found in the simulator unless given.
        drain_s: Seconds that requests have after that.
        workload: What is asked for; bursty chat unless given.
    """

    config: ServeConfig
    policies: tuple[str, ...] = ("slack", "lru")
    loads: tuple[float, ...] = (0.5, 0.9)
    duration_s: float = DURATION_S
    seed: int = 0
    rate_per_s: float | None = None
    drain_s: float = DRAIN_S
    workload: WorkloadSpec | None = None


def read_fleet(
    models: Sequence[str],
    device: str | None = None,
    memory: str | None = None,
    profiles: str | None = None,
) -> ServeConfig:
    """Return the fleet that a user names.

    Args:
        models: One TOML file as for ``mmrl serve``, or the models: checkpoint folders, or names of
            the testbed.
        device: In place of the file's.
        memory: Likewise, as in ``24GB``.
        profiles: Folder of measured profiles, likewise.

    Raises:
        InputError: Something in it is wrong.
    """
    config = read_models(models, "mmrl validate")
    given = {"device": device, "memory": memory, "profiles": profiles}
    node = config.node.model_dump(mode="json", exclude_none=True)
    node |= {field: value for field, value in given.items() if value is not None}
    checked = build_config({"models": [{"path": "model"}], "node": node}, "mmrl validate")
    return config.model_copy(update={"node": checked.node})


def measure(
    plan: Plan, out: Path, says: Says = print, progress: Progress | None = None
) -> list[Path]:
    """Open the fleet and make the runs that a folder does not have yet.

    Args:
        plan: Which runs.
        out: Their folder.
        says: Told in words what happens.
        progress: Told (model, bytes read, bytes in all) while weights are read.

    Returns:
        The files of all runs of the plan.

    Raises:
        InputError: The plan cannot be carried out, or the folder holds runs of another one.
        MmrlError: An iteration failed on the device.
    """
    policies = {Path(name).name: find_policy(name, "--policies") for name in plan.policies}
    if len(policies) < len(plan.policies):
        raise InputError("two policies have the same name", "rename the folder of one of them")
    config = _config(plan, list(policies.values()))
    kept = _kept_plan(plan, config, out)
    files = [out / f"{name}-{load:g}.npz" for load in plan.loads for name in policies]
    if all(file.exists() for file in files):
        says("all runs are there")
        return files
    fleet = open_fleet(config, progress, checkpoints=open_checkpoints(config.models))
    try:
        fleet.engine.close()
        for note in fleet.notes:
            says(note)
        # The engine that opened the fleet has taken the dispatch of its policy.
        numbers = replace(numbers_of(fleet.engine.node.state), dispatch=config.node.dispatch)
        costs = _fingerprint(fleet)
        if kept.get("costs", costs) != costs:
            raise InputError(f"{out} holds runs with other profiles", "choose another --out")
        spec = _workload(plan, fleet)
        rate = plan.rate_per_s or kept.get("rate_per_s")
        if rate is None:
            says("looking for load 1 in the simulator")
            rate = sustainable_rate(fleet.engine.node.models, numbers, spec, plan.duration_s)
        write_json(out / PLAN, kept | {"rate_per_s": rate, "costs": costs})
        says(f"load 1: {rate:.3g} requests per second")
        for load in plan.loads:
            arrivals = trace_of(spec, fleet, load * rate, plan.duration_s, plan.seed)
            for name, policy in policies.items():
                file = out / f"{name}-{load:g}.npz"
                if file.exists():
                    continue
                says(f"{name} at load {load:g}: {len(arrivals)} requests in {plan.duration_s:g} s")
                about = {"load": load, "rate_per_s": load * rate, "rate_at_load_1_per_s": rate}
                about |= {"workload": spec.model_dump(mode="json"), "seed": plan.seed}
                about["policy"] = _describe(name, policy, out)
                run = run_live(fleet, policy, arrivals, plan.drain_s, about=about, numbers=numbers)
                run.save(file)
                says(f"  {_outcome(run)}")
    finally:
        fleet.engine.close()
        fleet.close()
    return files


def trace_of(
    spec: WorkloadSpec, fleet: Fleet, rate_per_s: float, duration_s: float, seed: int
) -> Trace:
    """Draw the requests of a run.

    Raises:
        InputError: They are none, or more than a node can keep apart.
    """
    names = tuple(info.name for info in fleet.infos)
    trace = sample_trace(spec, names, rate_per_s, duration_s, seed)
    if not 0 < len(trace) <= CAPACITY:
        raise InputError(
            f"{rate_per_s:.3g} requests per second for {duration_s:g} s make {len(trace)} "
            f"requests, a run has 1 to {CAPACITY}",
            "change duration, loads or rate",
        )
    return trace


def run_live(
    fleet: Fleet,
    policy: Rule | ExportedPolicy,
    arrivals: Trace,
    drain_s: float = DRAIN_S,
    *,
    about: dict[str, Any],
    numbers: NodeNumbers,
    simulated: bool = False,
) -> Recording:
    """Let the live node serve a trace under a policy, and write down what happens.

    Args:
        fleet: Open; its engine is closed, and replaced by that of the run.
        policy: Who decides.
        arrivals: The requests.
        drain_s: Seconds that requests have after the last could arrive.
        about: What the header of the file says beside the node's numbers.
        numbers: Of the node.
        simulated: Time is that of the costs, and what comes of it the simulator's own.

    Raises:
        InputError: The policy has other verbs than the node.
        MmrlError: An iteration failed on the device.
    """
    given = fleet.engine
    node = RecordedNode.of(given.node.models, numbers)
    adapter = DeployAdapter(policy, get_rule("slack"), node.decode_tables, node.prefill_tables)
    sender = _Sender(arrivals)
    clock = SimulatedTime(sender.script()) if simulated else RealTime()
    engine = Engine(given.models, node, adapter, given.host_kv, fleet.device, clock)
    fleet.engine = sender.engine = engine
    node.zero_ns = time.monotonic_ns() - clock.now_ns()
    engine.emit = _refuse_errors
    if not simulated:  # else a worker's times are not those of the clock
        engine.watch = node.watch
    horizon_ns = round((arrivals.duration_s + drain_s) * 1e9)
    header = header_of(node, engine.names, **about)
    gc.collect()
    gc.freeze()  # what is there stays: a collection in the middle of a run would not look at it
    try:
        if not simulated:
            sender.start(node.zero_ns)
        engine.begin()
        while not sender.done and clock.now_ns() < horizon_ns:
            engine.run_instant()
    finally:
        sender.stop()
        gc.unfreeze()
    arrays = node.arrays()
    if node.failures:
        raise MmrlError(f"{node.failures} iterations failed", "look at the device's memory")
    header |= {
        "horizon_ns": horizon_ns,
        "device": device_name(fleet.device),
        "fallbacks": dict(adapter.fallbacks),
        "decision_s": [float(value) for value in _quantiles(engine.decision_latencies_s)],
        "lag_s": [float(value) for value in _quantiles(sender.lags_s)],
        "provenance": provenance([]),
    }
    _come_to_rest(engine)
    return Recording(header, _with_refused(node, arrays, sender.refused))


class _Sender:
    """Submits the requests of a trace at their instants, whatever the answers."""

    engine: Engine

    def __init__(self, arrivals: Trace) -> None:
        self._arrivals = arrivals
        self._requests = _requests(arrivals)
        self._stopped = threading.Event()
        self._sent = 0
        self.lags_s: list[float] = []
        self.refused: list[tuple[int, int, int, int]] = []  # instant, model, prompt, output

    def script(self) -> list[tuple[int, Callable[[], None]]]:
        """Return what a simulated clock does, and when."""
        instants = enumerate(self._arrivals.arrival_ns.tolist())
        return [(at_ns, functools.partial(self._submit, i)) for i, at_ns in instants]

    def start(self, zero_ns: int) -> None:
        """Send from a thread, as a server's front does.

        Args:
            zero_ns: What `time.monotonic_ns` was at instant 0.
        """
        threading.Thread(target=self._send, args=(zero_ns,), name="sender", daemon=True).start()

    def stop(self) -> None:
        """Send no more."""
        self._stopped.set()

    @property
    def done(self) -> bool:
        """Whether all requests were sent and have ended."""
        s = self.engine.node.state
        return self._sent == len(self._arrivals) and not (
            s.in_system or s.next_arrival < s.n_requests
        )

    def _send(self, zero_ns: int) -> None:
        for at_ns, submit in self.script():
            wait_s = (at_ns + zero_ns - time.monotonic_ns()) * 1e-9
            if self._stopped.wait(max(0.0, wait_s)):
                return
            self.engine.call(submit)

    def _submit(self, i: int) -> None:
        engine, request = self.engine, self._requests[i]
        count = int(engine.node.state.n_requests)
        engine.submit(i, request)
        now_ns = engine.clock.now_ns()
        if engine.node.state.n_requests == count:
            m = engine.names.index(request.model)
            self.refused.append((now_ns, m, len(request.prompt), request.max_tokens))
        self.lags_s.append((now_ns - int(self._arrivals.arrival_ns[i])) * 1e-9)
        self._sent += 1


def _requests(arrivals: Trace) -> list[Generate]:
    """Return greedy requests that end at their lengths; what they say does not matter."""
    return [
        Generate(
            arrivals.model_names[m],
            tuple(10 + (7 * k + i) % 200 for k in range(prompt)),
            output,
            ignore_eos=True,
            sampling=Sampling(0.0),
        )
        for i, (m, prompt, output) in enumerate(
            zip(
                arrivals.model.tolist(),
                arrivals.prompt_tokens.tolist(),
                arrivals.output_tokens.tolist(),
                strict=True,
            )
        )
    ]


def _refuse_errors(items: list[tuple[int, Tokens]]) -> None:
    for number, tokens in items:
        if tokens.finish is Finish.ERROR:
            raise MmrlError(f"request {number} failed: {tokens.error}")


def _come_to_rest(engine: Engine) -> None:
    """End all requests, let what is in flight end, and give the device's memory back."""
    adapter, s = engine.adapter, engine.node.state
    engine.adapter = Hands(
        adapter.champion, adapter.champion, adapter.decode_tables, adapter.prefill_tables
    )
    adapter.close()
    engine.emit = lambda items: None
    for number in range(int(s.n_requests)):
        engine.cancel(number)
    until_s = time.monotonic() + REST_S
    busy = True
    while busy:
        if time.monotonic() > until_s:
            raise MmrlError(f"the node is not at rest {REST_S:g} s after the end of a run")
        engine.run_instant()
        busy = bool(engine.open_requests or s.in_system or s.load_len or s.d2h_request >= 0)
        busy |= s.gpu_kind != IDLE or s.lb_kind != IDLE or s.h2d_kind != LINK_IDLE
        busy |= any(model.pool.blocks for model in engine.models)
    engine.close()
    for model in engine.models:
        model.weights.set_granted(None)


def _with_refused(
    node: LiveNode, arrays: dict[str, npt.NDArray[Any]], refused: Sequence[tuple[int, ...]]
) -> dict[str, npt.NDArray[Any]]:
    """Put the requests that the engine did not even take in among the others."""
    if not refused:
        return arrays
    count = len(arrays["request_model"])
    spare = LiveNode.of(node.models, numbers_of(node.state))
    for at_ns, m, prompt, output in refused:
        row = spare.requests[spare.submit(at_ns, m, prompt, output)]
        row["state"], row["miss"], row["finish_ns"] = REFUSED, MISS_REFUSED, at_ns
    more = spare.requests[: len(refused)]
    order = np.argsort(
        np.concatenate([arrays["request_arrival_ns"], more["arrival_ns"]]), kind="stable"
    )
    for name in REQUEST_FIELDS:
        both = np.concatenate([arrays[f"request_{name}"], more[name]])
        arrays[f"request_{name}"] = both[order]
    arrays["node_n_requests"] = np.asarray(count + len(refused))
    return arrays


def _quantiles(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """Return median, 99th percentile and maximum; zeros for nothing."""
    return np.percentile(values, (50, 99, 100)) if len(values) else np.zeros(3)


def _config(plan: Plan, policies: Sequence[Rule | ExportedPolicy]) -> ServeConfig:
    """Return the configuration with the verbs of the policies, and nothing pinned or preloaded.

    Raises:
        InputError: Two policies have other verbs than each other or the configuration.
    """
    learned = [policy for policy in policies if isinstance(policy, ExportedPolicy)]
    wanted = {policy.full_verbs for policy in learned if policy.card.verb_set != "both"}
    if plan.config.node.verbs is not None:
        wanted.add(plan.config.node.verbs == "full")
    if len(wanted) > 1:
        raise InputError(
            "the policies have different verb sets", "validate them in runs of their own"
        )
    verbs = "core" if wanted == {False} else "full"
    models = [m.model_copy(update={"pin": False, "preload": False}) for m in plan.config.models]
    node = plan.config.node.model_copy(update={"policy": "slack", "verbs": verbs})
    return plan.config.model_copy(update={"node": node, "models": tuple(models)})


def _kept_plan(plan: Plan, config: ServeConfig, out: Path) -> dict[str, Any]:
    """Return what the folder says of its runs, this plan if it has none.

    Raises:
        InputError: It holds runs of another fleet or workload, or something else.
    """
    workload = None if plan.workload is None else plan.workload.model_dump(mode="json")
    mine = {
        "config": config.model_dump(mode="json", exclude={"server": True, "node": {"profiles"}}),
        "duration_s": plan.duration_s,
        "drain_s": plan.drain_s,
        "seed": plan.seed,
        "workload": workload,
    }
    if not (out / PLAN).exists():
        refuse_foreign(out, False, "plan of runs")
        return mine
    try:
        kept: dict[str, Any] = json.loads((out / PLAN).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{out / PLAN}: {error}", "choose another --out") from error
    for field, value in mine.items():
        if kept.get(field) != value:
            raise InputError(f"{out} holds runs with another {field}", "choose another --out")
    if plan.rate_per_s not in (None, kept.get("rate_per_s")):
        raise InputError(f"{out} holds runs with another rate", "choose another --out")
    return kept


def _fingerprint(fleet: Fleet) -> str:
    """Return a hash of the measured profiles of a fleet, 12 hexadecimal digits.

    Derived ones are never quite the same where they come from a rough measurement at start.
    """
    profiles = [
        model.profile.model_dump_json() if model.profile.kind == "measured" else "derived"
        for model in fleet.engine.node.models
    ]
    return hashlib.sha256("".join(profiles).encode()).hexdigest()[:12]


def _workload(plan: Plan, fleet: Fleet) -> WorkloadSpec:
    if plan.workload is not None:
        return plan.workload
    limit = min(MOST_TOKENS, *(info.max_context for info in fleet.infos))
    return WorkloadSpec(arrivals=BURSTS, lengths=LengthSpec(context_limit_tokens=limit))


def _describe(name: str, policy: Rule | ExportedPolicy, out: Path) -> dict[str, Any]:
    """Say who decides, so that the simulator can ask the same; a trained policy is copied."""
    if isinstance(policy, Rule):
        return {"name": name, "kind": "rule", "rule": policy.name, "params": policy.model_dump()}
    source = DEFAULT_FOLDER if policy.name == DEFAULT else Path(policy.name)
    folder = source if (source / DESCRIPTION).exists() else source / BEST
    for file in (DESCRIPTION, WEIGHTS):
        (out / POLICIES / name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, out / POLICIES / name / file)
    return {"name": name, "kind": "learned", "folder": f"{POLICIES}/{name}"}


def _outcome(run: Recording) -> str:
    from mmrl.metrics import episode_metrics

    metrics = episode_metrics(*run.end())
    return (
        f"goodput {metrics['goodput']:.3f}, TTFT p99 {metrics['ttft_p99_s']:.2f} s, "
        f"{int(run.arrays['node_loads'].sum())} loads, "
        f"{int(run.arrays['node_preempted'].sum())} preemptions"
    )
