"""The engine: the simulator's decisions, everybody's tokens, and nothing lost when things fail."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from mmrl.agents.export import ExportedPolicy
from mmrl.deploy import engine as engine_module
from mmrl.deploy import transitions
from mmrl.deploy.checkpoint import Checkpoint
from mmrl.deploy.clock import RealTime, SimulatedTime
from mmrl.deploy.config import build_config
from mmrl.deploy.engine import FAILURES, Engine
from mmrl.deploy.fleet import Fleet, open_fleet
from mmrl.deploy.kv import HostFull
from mmrl.deploy.memory import BudgetExceeded, OutOfDeviceMemory
from mmrl.deploy.process import Orders, follow
from mmrl.deploy.protocol import Finish, Generate, Sampling, Tokens
from mmrl.deploy.reasons import reason
from mmrl.deploy.served import Sequence_
from mmrl.deploy.streaming import StreamSlots
from mmrl.deploy.testbed import MODELS, configuration
from mmrl.node.actions import (
    LEVEL_0,
    LEVEL_25,
    LEVEL_50,
    LEVEL_100,
    OUT,
    PAUSE,
    RESUME,
    WAIT,
    encode,
    legal_actions,
    some_verb_legal,
)
from mmrl.node.observe import observation_size, observe
from mmrl.node.state import CANCELLED, MAX_MODELS, new_nodes, new_requests
from mmrl.rules import get_rule
from mmrl.rules.dispatch import suggest
from mmrl.sim.kernel import act, next_decision, start
from tests.deploy.test_adapter import Policy
from tests.deploy.test_checkpoint import assemble

GREEDY = Sampling(0.0)
HANGS_S = 150.0  # no test takes so long, not even on a busy machine
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def checkpoints(count: int = 3) -> list[Checkpoint]:
    kinds = (LlamaConfig, Qwen2Config)
    return [
        Checkpoint.from_config(
            kinds[i % 2](**SHAPE, num_hidden_layers=4 + i), torch.float32, seed=i
        )
        for i in range(count)
    ]


def fleet_of(models: list[Checkpoint], memory: float, clock: Any = None, **node: Any) -> Fleet:
    """A fleet on the CPU with so many times its weights as memory beside what is reserved."""
    names = [f"m{i}" for i in range(len(models))]
    probe = build_config({"models": [{"path": name} for name in names]}, "test")
    budget = 2**30
    config = probe.model_copy(
        update={
            "node": probe.node.model_copy(
                update={
                    "device": "cpu",
                    "memory": budget,
                    "host_kv": 2**20,
                    "policy": "slack",  # the simulator's side of a comparison is this rule
                    **node,
                }
            )
        }
    )
    fleet = open_fleet(config, clock=clock, checkpoints=models)
    s = fleet.engine.node.state
    weights = sum(sum(model.weights.piece_bytes) for model in fleet.engine.models)
    s.budget_bytes = s.reserve_bytes + int(memory * weights)
    return fleet


class Failing:
    """A function that raises at some of its calls, which count from 1."""

    def __init__(self, function: Callable[..., Any], error: Exception, *at: int) -> None:
        self.function, self.error, self.at = function, error, at
        self.calls = 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls in self.at:
            raise self.error
        return self.function(*arguments)


class Listener:
    """What the front hears."""

    def __init__(self, engine: Engine) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.finish: dict[int, Finish] = {}
        self.errors: dict[int, str] = {}
        self.refused: dict[int, str] = {}
        engine.emit = self._emit
        engine.refuse = self._refuse

    def _emit(self, items: list[tuple[int, Tokens]]) -> None:
        for number, tokens in items:
            assert number not in self.finish, "tokens after the end"
            self.tokens.setdefault(number, []).extend(tokens.tokens)
            if tokens.finish is not None:
                self.finish[number] = tokens.finish
                self.errors[number] = tokens.error

    def _refuse(self, number: int, kind: str, words: str) -> None:
        self.refused[number] = kind


def request(model: int, prompt: int, output: int, seed: int = 0, **more: Any) -> Generate:
    rng = np.random.default_rng(seed)
    tokens = tuple(int(t) for t in rng.integers(3, 320, prompt))
    return Generate(f"m{model}", tokens, output, **{"ignore_eos": True, **more})


def run(engine: Engine, until: Callable[[], bool], limit: int = 200_000) -> None:
    begun = time.monotonic()
    for _ in range(limit):
        if until():
            return
        engine.run_instant()
        assert time.monotonic() - begun < HANGS_S, "it does not come to an end"
    raise AssertionError("it does not come to an end")


@pytest.fixture
def closing() -> Iterator[list[Fleet]]:
    fleets: list[Fleet] = []
    yield fleets
    for fleet in fleets:
        fleet.engine.close()
        fleet.close()


def expected(models: list[Checkpoint], asked: list[Generate], closing: list[Fleet]) -> list[Any]:
    """The tokens of each request when it has the node for itself and everything fits."""
    fleet = fleet_of(models, 10.0)
    closing.append(fleet)
    engine, heard = fleet.engine, Listener(fleet.engine)
    engine.begin()
    for number, one in enumerate(asked):
        engine.submit(number, one)
        run(engine, lambda n=number: n in heard.finish)
    return [heard.tokens[number] for number in range(len(asked))]


def together(engine: Engine, heard: Listener, asked: list[Generate]) -> list[Any]:
    """Ask for all at once, and return the tokens of each when all have ended."""
    for number, one in enumerate(asked):
        engine.submit(number, one)
    run(engine, lambda: len(heard.finish) == len(asked))
    return [heard.tokens[number] for number in range(len(asked))]


def script(seed: int, count: int, models: int) -> list[tuple[int, Generate]]:
    rng = np.random.default_rng(seed)
    at = 0
    asked = []
    for i in range(count):
        at += int(rng.exponential(12e6))
        sampling = Sampling(temperature=float(i % 2), seed=i)
        one = request(
            int(rng.integers(models)),
            int(rng.integers(1, 120)),
            int(rng.integers(1, 60)),
            i,
            sampling=sampling,
        )
        asked.append((at, one))
    return asked


def slow_link(fleet: Fleet) -> None:
    """Make loads and saves take long against iterations, as between a real host and device."""
    s = fleet.engine.node.state
    s.gap_ns, s.decided_ns, s.latency_ns = 3_000_000, -3_000_000, 1_000_000
    for field in ("load_layer_ns", "load_base_ns", "stream_layer_ns", "load_fixed_ns"):
        s[field][: s.n_models] = 5_000_000
    for field in ("save_fixed_ns", "restore_fixed_ns"):
        s[field][: s.n_models] = 3_000_000


@pytest.mark.parametrize("verbs", ["core", "full"])
@pytest.mark.parametrize("seed", range(3))
def test_decisions_are_the_simulators(seed: int, verbs: str, closing: list[Fleet]) -> None:
    """One script of requests on the node under the costs' clock, and in the simulator.

    Every observation, mask and decision is the same, and so is every token that comes of it.
    """
    models = checkpoints()
    asked = script(seed, 25, len(models))
    clock = SimulatedTime([])
    fleet = fleet_of(models, 0.62, clock, verbs=verbs)
    closing.append(fleet)
    slow_link(fleet)
    engine, node = fleet.engine, fleet.engine.node
    heard = Listener(engine)
    rng = np.random.default_rng(seed)

    # the simulator, with the same numbers and arrivals
    nodes, table = new_nodes(1), new_requests(1, len(asked))
    s, r = nodes[0], table[0]
    nodes[0] = node.state
    s.n_requests = len(asked)
    for i, (at, one) in enumerate(asked):
        row = node.submit(at, engine.names.index(one.model), len(one.prompt), one.max_tokens)
        r[i] = node.requests[row]
    node.state.n_requests = 0
    ready = np.zeros(MAX_MODELS, np.int8)
    start(s, r)
    tables = node.decode_tables, node.prefill_tables
    seen: list[tuple[int, Any, Any, int, int]] = []
    rule = get_rule("slack")
    full = int(s.full_verbs)

    while len(seen) < 3_000:
        next_decision(s, r, ready, *tables)
        while not s.done and not some_verb_legal(s, r):
            next_decision(s, r, ready, *tables)
        if s.done:
            break
        more = True
        while more:
            observation = np.zeros(observation_size(len(models)), np.float32)
            observe(s, r, *tables, observation)
            mask = np.zeros(1 + len(models) * (9 if full else 4), np.bool_)
            legal_actions(s, r, mask)
            champion = suggest(rule.number, s, r, *tables, rule.params)
            action = champion if rng.random() < 0.7 else int(rng.choice(np.flatnonzero(mask)))
            seen.append((int(s.now_ns), observation, mask, champion, action))
            more = act(s, r, action)
    assert s.done == 1 and len(seen) > 30

    # the node
    replayed = 0

    class Script:
        """An adapter that checks what a policy would see and takes the simulator's decision."""

        def __getattr__(self, name: str) -> Any:
            return getattr(adapter, name)

        def decide(self, nodes: Any, table: Any) -> Any:
            nonlocal replayed
            from mmrl.deploy.adapter import Verdict

            at, observation, mask, champion, action = seen[replayed]
            observed, legal = node.look()
            assert node.state.now_ns == at
            assert adapter.decide(nodes, table).action == champion
            np.testing.assert_array_equal(observed, observation)
            np.testing.assert_array_equal(legal, mask)
            replayed += 1
            return Verdict(action, "policy", 0.0)

    adapter, engine.adapter = engine.adapter, Script()  # type: ignore[assignment]
    clock._script.extend(
        (at, lambda n=n, one=one: engine.submit(n, one)) for n, (at, one) in enumerate(asked)
    )
    engine.begin()
    run(engine, lambda: len(heard.finish) == len(asked))
    assert replayed == len(seen)
    for field in ("loads", "outs", "preempted", "load_bytes", "stream_bytes", "kv_save_bytes"):
        assert np.array_equal(node.state[field], s[field]), field
    assert s.outs.sum() > 0 and s.loads.sum() > 3
    assert heard.tokens == dict(enumerate(expected(models, [one for _, one in asked], closing)))


class Deciding:
    """An adapter that may replace what its champion says."""

    def __init__(self, engine: Engine, choose: Callable[[], int | None]) -> None:
        self._adapter, self._choose = engine.adapter, choose

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def poll(self, nodes: Any, table: Any) -> Any:
        verdict, action = self._adapter.poll(nodes, table), self._choose()
        return verdict if action is None else type(verdict)(action, "policy", 0.0)


def decide_at_random(engine: Engine, rng: np.random.Generator, share: float) -> None:
    def choose() -> int | None:
        if rng.random() >= share:
            return None
        return int(rng.choice(np.flatnonzero(engine.node.look()[1])))

    engine.adapter = Deciding(engine, choose)  # type: ignore[assignment]


def decide_by_hand(engine: Engine) -> Callable[[int, int], None]:
    """Have nobody decide; return what does a verb (index into VERBS) on a model, in the loop."""
    engine.adapter = Deciding(engine, lambda: WAIT)  # type: ignore[assignment]
    node = engine.node

    def verb(m: int, verb: int) -> None:
        assert node.legal(m, verb)
        node.act(encode(int(node.state.full_verbs), m, verb))
        node.state.acted[:] = 0

    return verb


def linger(engine: Engine, before_end: Callable[[], None] = lambda: time.sleep(0.001)) -> None:
    """Do something on the thread of each link-bound iteration after it has computed."""

    def lingering(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            result = function(*arguments, **named)
            if threading.current_thread().name == "link-bound":
                before_end()
            return result

        return call

    for model in engine.models:
        runner: Any = model.runner
        runner.launch_decode = lingering(runner.launch_decode)
        runner.prefill = lingering(runner.prefill)


def test_random_decisions_in_real_time_change_no_token(closing: list[Fleet]) -> None:
    models = checkpoints()
    asked = [one for _, one in script(7, 24, len(models))]
    wanted = expected(models, asked, closing)
    fleet = fleet_of(models, 0.62, verbs="full")
    closing.append(fleet)
    engine, s = fleet.engine, fleet.engine.node.state
    heard, rng = Listener(engine), np.random.default_rng(0)

    decide_at_random(engine, rng, 0.5)
    linger(engine)
    s.gap_ns = 1_000_000
    engine.begin()
    assert together(engine, heard, asked) == wanted
    assert s.outs.sum() > 0 and s.preempted.sum() > 0 and s.stream_bytes.sum() > 0
    assert engine.transfers.prefetched > 0
    assert fleet.memory.peak_bytes <= fleet.memory.budget_bytes


def generated(checkpoint: Checkpoint, asked: Generate) -> list[int]:
    """What ``generate`` of transformers makes of a request, greedily."""
    module: Any = assemble(checkpoint)
    module.generation_config.eos_token_id = None
    prompt = torch.tensor([asked.prompt])
    with torch.inference_mode():
        output = module.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=asked.max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return [int(token) for token in output[0, len(asked.prompt) :]]


def test_eight_families_share_a_device_and_lose_no_token(closing: list[Fleet]) -> None:
    """Random decisions: levels, evictions, reloads, preemption; every token as if alone."""
    names = [name for name in MODELS if name.endswith("-tiny")]
    models = [Checkpoint.from_config(configuration(name), torch.float32) for name in names]
    assert len(models) >= 8
    rng = np.random.default_rng(3)
    asked = [
        request(
            i % len(models), int(rng.integers(5, 90)), int(rng.integers(4, 20)), i, sampling=GREEDY
        )
        for i in range(2 * len(models))
    ]
    wanted = expected(models, asked, closing)
    for model, one, tokens in zip(models, asked, wanted, strict=False):  # one of each family
        assert tokens == generated(model, one)
    fleet = fleet_of(models, 0.35, verbs="full")
    closing.append(fleet)
    engine, s, heard = fleet.engine, fleet.engine.node.state, Listener(fleet.engine)

    decide_at_random(engine, rng, 0.4)
    s.gap_ns = 5_000_000
    engine.begin()
    for first in range(0, 10 * len(asked), len(asked)):  # a fast machine decides less in a round
        numbers = range(first, first + len(asked))
        for number, one in zip(numbers, asked, strict=True):
            engine.submit(number, one)
        run(engine, lambda end=numbers.stop: len(heard.finish) == end)
        assert [heard.tokens[number] for number in numbers] == wanted
        if s.outs.sum() > 3 and s.preempted.sum() > 0:
            return
    raise AssertionError("hardly anything was put out or preempted")


@pytest.mark.parametrize("prompt", [20, 27], ids=["within a block", "at a new block"])
def test_a_step_ahead_of_a_preempted_sequence_is_computed_again(
    prompt: int, closing: list[Fleet]
) -> None:
    """The KV that the step writes is not in what the host has."""
    models = checkpoints(2)
    asked = request(0, prompt, 40, sampling=GREEDY)
    fleet = fleet_of(models, 3.0, verbs="full")
    closing.append(fleet)
    engine, s = fleet.engine, fleet.engine.node.state
    heard, verb, runner = Listener(engine), decide_by_hand(engine), engine.models[0].runner
    decode, compute = runner.launch_decode, engine.iterations.compute
    held = {prompt + 4: threading.Event(), prompt + 5: threading.Event()}  # by position

    def hold(batch: Any, resident: bool) -> Any:
        if batch[0].position in held:
            held[batch[0].position].wait(HANGS_S)
        return decode(batch, resident)

    runner.launch_decode = hold  # type: ignore[method-assign]
    engine.begin()
    engine.call(lambda: verb(0, LEVEL_100))
    engine.submit(0, asked)
    run(engine, lambda: bool(compute.ahead) and compute.ahead[0].position == (prompt + 5,))
    engine.call(lambda: verb(0, OUT))
    run(engine, lambda: bool(s.target[0] == 0))
    held[prompt + 4].set()
    run(engine, lambda: bool(s.saved[0] == 1 or engine._memory.unsettled))
    held[prompt + 5].set()
    run(engine, lambda: bool(s.saved[0] == 1))
    engine.call(lambda: verb(0, LEVEL_100))
    engine.call(lambda: verb(0, PAUSE))  # no step while it loads
    run(engine, lambda: bool(s.landed[0] == s.pieces[0]))
    engine.call(lambda: verb(0, RESUME))
    run(engine, lambda: 0 in heard.finish)
    assert [heard.tokens[0]] == expected(models, [asked], closing)


class Streaming:
    """A node whose models stream half of their layers, and a step of which ends when it is told.

    Attributes:
        copies: Layers that went over the link to a slot.
        begun: Link-bound iterations that have computed.
    """

    def __init__(self, closing: list[Fleet], end_when: Callable[["Streaming"], bool]) -> None:
        self.models = checkpoints(2)
        self.fleet = fleet_of(self.models, 3.0, verbs="full")
        closing.append(self.fleet)
        self.engine = self.fleet.engine
        self.heard, self.copies, self.begun = Listener(self.engine), 0, 0
        self.verb = decide_by_hand(self.engine)
        self._end_when = end_when
        for model in self.engine.models:
            self._count_copies(model.weights)
        linger(self.engine, self._before_end)
        self.engine.begin()
        for m in range(2):
            self.engine.call(lambda m=m: self.verb(m, LEVEL_50))  # type: ignore[misc]
        s = self.engine.node.state
        run(self.engine, lambda: bool((s.landed[:2] == [3, 4]).all()))

    @property
    def slots(self) -> StreamSlots:
        return self.fleet._slots

    @property
    def prefetched(self) -> int:
        return self.engine.transfers.prefetched

    @property
    def asked_layers(self) -> int:
        """Layers that the state has asked for."""
        s = self.engine.node.state
        return int((s.stream_bytes[:2] // s.layer_bytes[:2]).sum())

    def finish(self, asked: list[Generate], closing: list[Fleet]) -> None:
        """Run to the end and compare all tokens with those of each request alone."""
        run(self.engine, lambda: len(self.heard.finish) == len(asked))
        run(self.engine, lambda: self.engine.transfers.h2d.unfinished is None)
        wanted = expected(self.models, asked, closing)
        for number, tokens in enumerate(wanted):
            if self.heard.finish[number] is not Finish.CANCELLED:
                assert self.heard.tokens[number] == tokens
        kept = {None, self.slots.early}
        assert {slot.user for slot in self.slots.slots} <= kept

    def _before_end(self) -> None:
        self.begun += 1
        deadline = time.monotonic() + HANGS_S
        while not self._end_when(self):
            assert time.monotonic() < deadline, "the step is never told to end"
            time.sleep(0.0005)

    def _count_copies(self, weights: Any) -> None:
        fill = weights._fill_slot

        def filling(layer: int, gate: Any) -> bool:
            came = bool(fill(layer, gate))
            self.copies += came
            return came

        weights._fill_slot = filling


def test_the_layers_of_the_next_step_come_before_it_begins(closing: list[Fleet]) -> None:
    """Both slots are filled again before a step ends; each layer goes over the link once a step.

    A prefill, five steps; nothing is known to follow the last.
    """
    asked = [request(0, 40, 6, sampling=GREEDY)]
    node = Streaming(closing, lambda node: node.prefetched == 2 * min(node.begun, 5))
    node.engine.submit(0, asked[0])
    node.finish(asked, closing)
    assert node.begun == 6 and node.prefetched == 10
    assert node.copies == node.asked_layers == 12


@pytest.mark.parametrize("why", ["level", "resident", "out", "cancelled", "other", "load"])
def test_layers_that_came_for_a_step_that_does_not_come_do_no_harm(
    why: str, closing: list[Fleet]
) -> None:
    asked = [request(0, 40, 8, sampling=GREEDY), request(1, 30, 4, 1, sampling=GREEDY)]
    told, events = threading.Event(), []

    def end(node: Streaming) -> bool:
        if node.begun != 3:
            return True
        early = node.slots.early
        came = all(slot.user is early and not slot.copying for slot in node.slots.slots)
        if early is not None and came and not told.is_set():
            told.set()
            node.engine.call(lambda: happen(node))
        return bool(events)

    def happen(node: Streaming) -> None:
        events.append(node.slots.early)
        if why == "level":
            node.verb(0, LEVEL_25)
        elif why == "resident":
            node.verb(0, LEVEL_100)
        elif why == "out":
            node.verb(0, OUT)
            node.engine.call(lambda: node.verb(0, LEVEL_25))
        elif why == "cancelled":
            node.engine.cancel(0)
        elif why == "load":
            node.verb(1, LEVEL_100)
        if why != "load":
            node.engine.submit(1, asked[1])

    node = Streaming(closing, end)
    node.engine.submit(0, asked[0])
    run(node.engine, lambda: bool(events))
    if why == "load":
        s = node.engine.node.state
        run(node.engine, lambda: s.landed[1] == s.pieces[1])
        node.engine.submit(1, asked[1])
    node.finish(asked, closing)
    lost = node.copies - node.asked_layers
    assert events[0].closed
    assert lost == 0 if why == "load" else lost >= 2  # a load comes before them, no more


def test_an_iteration_that_waits_for_its_layers_stops_no_other_model(closing: list[Fleet]) -> None:
    fleet = fleet_of(checkpoints(2), 3.0, verbs="full")
    closing.append(fleet)
    engine, heard, s = fleet.engine, Listener(fleet.engine), fleet.engine.node.state
    verb, held, go_on = decide_by_hand(engine), threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        go_on.wait(HANGS_S)

    linger(engine, hold)
    engine.begin()
    engine.call(lambda: verb(0, LEVEL_50))
    engine.call(lambda: verb(1, LEVEL_100))
    run(engine, lambda: bool((s.landed[:2] == [3, s.pieces[1]]).all()))
    engine.submit(0, request(0, 30, 5))
    run(engine, held.is_set)
    engine.submit(1, request(1, 30, 20))
    run(engine, lambda: 1 in heard.finish)
    assert heard.finish == {1: Finish.LENGTH} and 0 not in heard.tokens
    go_on.set()
    run(engine, lambda: 0 in heard.finish)


@pytest.mark.parametrize("frees", ["save", "link-bound iteration"])
def test_memory_that_cannot_be_taken_yet_holds_up_nothing_that_frees_it(
    frees: str, closing: list[Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where blocks lie scattered, and cannot be moved before what uses them has ended."""
    fleet = fleet_of(checkpoints(2), 3.0, verbs="full")
    closing.append(fleet)
    engine, s = fleet.engine, fleet.engine.node.state
    heard, verb, memory = Listener(engine), decide_by_hand(engine), engine._memory
    grow, refused = memory._grow, 0

    def full() -> None:
        nonlocal refused
        streams = engine.iterations.link_bound.current is not None
        if s.d2h_request >= 0 if frees == "save" else streams:
            refused += 1
            raise BudgetExceeded("scattered", "")
        grow()

    engine.begin()
    engine.call(lambda: verb(0, LEVEL_100 if frees == "save" else LEVEL_0))
    run(engine, lambda: s.granted[0] == s.landed[0] > 0)
    monkeypatch.setattr(memory, "_grow", full)
    engine.submit(0, request(0, 30, 20))
    if frees == "save":
        run(engine, lambda: len(heard.tokens.get(0, [])) > 2)
        engine.call(lambda: verb(0, OUT))
        run(engine, lambda: s.saved[0] == 1)
        engine.call(lambda: verb(0, LEVEL_100))
    run(engine, lambda: 0 in heard.finish)
    assert heard.finish[0] is Finish.LENGTH and refused > 0


def test_what_a_step_ahead_used_can_be_moved_when_it_has_ended(
    closing: list[Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a node whose blocks lie scattered waits for an iteration that waits for memory."""
    engine, heard = one_model(closing)
    iterations, memory = engine.iterations, engine._memory
    grow, refused = memory._grow, 0

    def scattered() -> None:
        nonlocal refused
        if 0 in iterations.models_in_use:
            refused += 1
            raise BudgetExceeded("scattered", "")
        grow()

    engine.submit(0, request(0, 30, 20))
    run(engine, lambda: bool(iterations.compute.ahead))
    monkeypatch.setattr(memory, "_grow", scattered)
    run(engine, lambda: 0 in heard.finish)
    assert heard.finish[0] is Finish.LENGTH and refused > 0


@pytest.mark.parametrize("seed", range(2))
def test_whatever_happens_while_memory_is_short_no_token_is_lost(
    seed: int, closing: list[Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random decisions, cancellations, moves of rows; memory can be had when nothing uses it."""
    models, rng = checkpoints(), np.random.default_rng(seed)
    asked = [one for _, one in script(seed, 20, len(models))]
    wanted = expected(models, asked, closing)
    fleet = fleet_of(models, 0.62, verbs=("core", "full")[seed % 2])
    closing.append(fleet)
    engine, s = fleet.engine, fleet.engine.node.state
    heard, memory, transfers = Listener(engine), engine._memory, engine.transfers
    grow, cancelled = memory._grow, set()

    def scattered() -> None:
        used = engine.iterations.models_in_use or any(
            isinstance(one, Sequence_) for one in transfers.moving
        )
        if used and (memory.unsettled or memory.ungranted) and rng.random() < 0.8:
            raise BudgetExceeded("scattered", "")
        grow()

    decide_at_random(engine, rng, 0.5)
    monkeypatch.setattr(engine_module, "STANDSTILL_S", 0.3)
    monkeypatch.setattr(memory, "_grow", scattered)
    s.gap_ns = 1_000_000
    engine.begin()
    for number, one in enumerate(asked):
        engine.call(lambda number=number, one=one: engine.submit(number, one))
    begun = time.monotonic()
    while len(heard.finish) < len(asked):
        assert time.monotonic() - begun < HANGS_S, "it does not come to an end"
        match rng.integers(50):
            case 0:
                engine.call(engine._compact)
            case 1:
                cancelled.add(int(rng.integers(len(asked))))
                engine.call(lambda: [engine.cancel(number) for number in cancelled])
        engine.run_instant()
    run(engine, lambda: s.in_system == 0 and not any(model.pool.blocks for model in engine.models))
    for number, tokens in enumerate(wanted):
        got = heard.tokens[number]
        if number in cancelled:
            assert got == tokens[: len(got)]
        else:
            assert got == tokens


def test_a_load_that_lost_its_target_and_got_it_back_brings_its_piece(
    closing: list[Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state counts the piece that waited for memory meanwhile."""
    engine, heard = one_model(closing)
    verb, s, memory, short = decide_by_hand(engine), engine.node.state, engine._memory, True
    grow = memory._grow

    def scattered() -> None:
        if short:
            raise BudgetExceeded("scattered", "")
        grow()

    monkeypatch.setattr(memory, "_grow", scattered)
    engine.call(lambda: verb(0, LEVEL_100))
    run(engine, lambda: bool(memory.ungranted))
    short = False
    for level in (OUT, LEVEL_100):
        engine.call(lambda level=level: verb(0, level))
        engine.run_instant()
    run(engine, lambda: s.landed[0] == s.pieces[0])
    assert len(engine.models[0].weights.landed) == s.pieces[0]
    engine.submit(0, request(0, 30, 5))
    run(engine, lambda: 0 in heard.finish)
    assert heard.finish[0] is Finish.LENGTH


@pytest.mark.parametrize("then", ["leave", "move to another row"])
def test_a_request_that_waits_for_blocks_can(
    then: str, closing: list[Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two whose KV is to be restored, where blocks lie scattered."""
    engine, heard = one_model(closing)
    verb, s, memory, short = decide_by_hand(engine), engine.node.state, engine._memory, True
    grow = memory._grow

    def scattered() -> None:
        if short and memory.unsettled:
            raise BudgetExceeded("scattered", "")
        grow()

    engine.submit(0, request(0, 10, 3))
    engine.call(lambda: verb(0, LEVEL_100))
    run(engine, lambda: 0 in heard.finish)
    two = (1, 2)
    for number in two:
        engine.submit(number, request(0, 30, 60))
    run(engine, lambda: all(len(heard.tokens.get(number, [])) > 2 for number in two))
    engine.call(lambda: verb(0, OUT))
    run(engine, lambda: s.saved[0] == 2 and not memory.unsettled)
    monkeypatch.setattr(memory, "_grow", scattered)
    engine.call(lambda: verb(0, LEVEL_100))
    run(engine, lambda: len(memory.unsettled) == 2)
    if then == "leave":
        for number in two:
            engine.cancel(number)
    else:
        engine._compact()
    engine.run_instant()
    short = False
    run(engine, lambda: len(heard.finish) == 3)
    finish = Finish.CANCELLED if then == "leave" else Finish.LENGTH
    assert [heard.finish[number] for number in two] == [finish, finish]
    engine.submit(3, request(0, 10, 5))
    run(engine, lambda: 3 in heard.finish)
    assert len(heard.tokens[3]) == 5 and engine.models[0].pool.blocks == 0


def test_what_is_compiled_is_compiled_before_a_node_is_ready(
    closing: list[Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first requests wait for it."""
    mine = {name for name, one in vars(transitions).items() if is_transition(one)}
    called = set()

    def recorded(name: str) -> Callable[..., Any]:
        function = getattr(transitions, name)

        def call(*args: Any) -> Any:
            called.add(name)
            return function(*args)

        return call

    for name in mine:
        monkeypatch.setattr(transitions, name, recorded(name))
    closing.append(fleet_of(checkpoints(1), 2.0))
    assert called == mine


def is_transition(one: Any) -> bool:
    return callable(one) and one.__module__ == transitions.__name__


def test_an_iteration_that_is_given_up_is_no_failure_of_its_model(closing: list[Fleet]) -> None:
    engine, heard = one_model(closing, verbs="full")
    verb, node, given_up = decide_by_hand(engine), engine.node, []

    def ended() -> bool:
        gate = engine.transfers.gate
        if gate is not None and gate not in given_up and len(given_up) <= FAILURES:
            given_up.append(gate)
            gate.cancel()
        if node.legal(0, LEVEL_0):
            verb(0, LEVEL_0)
        return 0 in heard.finish

    engine.submit(0, request(0, 30, 5))
    run(engine, ended)
    assert len(given_up) > FAILURES and heard.finish[0] is Finish.LENGTH


def test_the_log_says_that_a_node_stands_still(
    closing: list[Fleet], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, heard = one_model(closing)
    memory = engine._memory
    grow = memory._grow

    def scattered() -> None:
        if not caplog.records:
            raise BudgetExceeded("scattered", "")
        grow()

    monkeypatch.setattr(engine_module, "STANDSTILL_S", 0.3)
    monkeypatch.setattr(memory, "_grow", scattered)
    engine.submit(0, request(1, 30, 5))
    run(engine, lambda: 0 in heard.finish)
    (record,) = caplog.records
    assert "weights of ['m1'] wait" in record.getMessage()


def one_model(closing: list[Fleet], memory: float = 3.0, **node: Any) -> tuple[Engine, Listener]:
    fleet = fleet_of(checkpoints(2), memory, **node)
    closing.append(fleet)
    fleet.engine.begin()
    return fleet.engine, Listener(fleet.engine)


def test_stop_length_and_eos(closing: list[Fleet]) -> None:
    engine, heard = one_model(closing)
    engine.submit(1, request(0, 10, 20, sampling=Sampling(0.0)))
    run(engine, lambda: 1 in heard.finish)
    assert heard.finish[1] is Finish.LENGTH and len(heard.tokens[1]) == 20
    third = heard.tokens[1][2]
    first = heard.tokens[1].index(third)
    engine.models[0].eos = frozenset({third})
    engine.submit(2, request(0, 10, 20, sampling=Sampling(0.0), ignore_eos=False))
    run(engine, lambda: 2 in heard.finish)
    assert heard.finish[2] is Finish.STOP and heard.tokens[2] == heard.tokens[1][:first]
    engine.submit(3, request(0, 10, 20, sampling=Sampling(0.0), ignore_eos=True))
    run(engine, lambda: 3 in heard.finish)
    assert heard.tokens[3] == heard.tokens[1]
    assert engine.node.state.in_system == 0 and engine.models[0].pool.blocks == 0


@pytest.mark.parametrize("when", ["queued", "prefill", "decode"])
def test_a_cancelled_request_frees_its_memory(when: str, closing: list[Fleet]) -> None:
    engine, heard = one_model(closing)
    s = engine.node.state
    engine.submit(1, request(0, 400, 100))
    if when == "prefill":
        run(engine, lambda: bool(s.prefilling[0] >= 0))
    elif when == "decode":
        run(engine, lambda: len(heard.tokens.get(1, [])) > 3)
    engine.cancel(1)
    run(engine, lambda: 1 in heard.finish)
    run(engine, lambda: s.in_system == 0 and engine.models[0].pool.blocks == 0)
    assert heard.finish == {1: Finish.CANCELLED} and s.kv_blocks[0] == 0
    assert engine.node.requests[0]["state"] == CANCELLED  # it did not run to its end unheard
    engine.submit(2, request(0, 10, 5))
    run(engine, lambda: 2 in heard.finish)
    assert len(heard.tokens[2]) == 5


def test_a_request_that_ends_before_it_begins_is_forgotten(closing: list[Fleet]) -> None:
    """Not only when the table of requests is full: until then its prompt takes memory."""
    engine, heard = one_model(closing)
    engine.submit(0, request(0, 400, 100))
    run(engine, lambda: 0 in heard.tokens)
    for number in range(1, 300):
        engine.submit(number, request(0, 400, 100))
    engine.run_instant()
    for number in range(100, 300):
        engine.cancel(number)
    engine.submit(300, request(0, 400, 100))  # in and out within an instant
    engine.cancel(300)
    run(engine, lambda: set(range(100, 301)) <= {*heard.finish, *heard.refused})
    run(engine, lambda: len(engine._rows) == engine.open_requests)
    for number in range(100):
        engine.cancel(number)
    run(engine, lambda: engine.node.state.in_system == 0)
    run(engine, lambda: not engine._rows)


def test_a_failing_request_takes_no_other_with_it(closing: list[Fleet]) -> None:
    engine, heard = one_model(closing)
    runner = engine.models[0].runner
    decode, poison = runner.launch_decode, [-1]

    def failing(batch: Any, resident: bool) -> Any:
        if any(one.sampling.seed == poison[0] for one in batch):
            raise RuntimeError("poisoned")
        return decode(batch, resident)

    runner.launch_decode = failing  # type: ignore[method-assign]
    for number in range(3):
        sampling = Sampling(0.0, seed=number)
        engine.submit(number, request(0, 20, 30, number, sampling=sampling))
    run(engine, lambda: all(len(heard.tokens.get(n, [])) > 2 for n in range(3)))
    poison[0] = 1
    run(engine, lambda: len(heard.finish) == 3)
    assert heard.finish[1] is Finish.ERROR and "poisoned" in heard.errors[1]
    assert heard.finish[0] is heard.finish[2] is Finish.LENGTH
    assert not engine.models[0].quarantined


def test_a_step_that_fails_for_all_its_sequences_is_one_failure(closing: list[Fleet]) -> None:
    engine, heard = one_model(closing)
    decode = engine.models[0].runner.launch_decode

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("broken")

    def batch(first: int) -> range:
        numbers = range(first, first + FAILURES + 1)
        for number in numbers:
            engine.submit(number, request(0, 20, 30, number))
        run(engine, lambda: all(len(heard.tokens.get(n, [])) > 2 for n in numbers))
        engine.models[0].runner.launch_decode = broken  # type: ignore[method-assign]
        run(engine, lambda: set(numbers) <= set(heard.finish))
        engine.models[0].runner.launch_decode = decode  # type: ignore[method-assign]
        return numbers

    for again in range(2):
        numbers = batch(10 * again)
        assert {heard.finish[number] for number in numbers} == {Finish.ERROR}
        assert engine.models[0].failures == 1 and not engine.models[0].quarantined


def test_repeated_failures_quarantine_a_model(closing: list[Fleet]) -> None:
    engine, heard = one_model(closing)
    prefill = engine.models[0].runner.prefill

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("broken")

    engine.models[0].runner.prefill = broken  # type: ignore[method-assign]
    for number in range(FAILURES):
        engine.submit(number, request(0, 20, 5))
        run(engine, lambda n=number: n in heard.finish)
    assert set(heard.finish.values()) == {Finish.ERROR} and engine.models[0].quarantined
    engine.submit(10, request(0, 20, 5))
    engine.submit(11, request(1, 20, 5))
    run(engine, lambda: 11 in heard.finish)
    assert heard.refused == {10: "quarantined"} and heard.finish[11] is Finish.LENGTH
    engine.models[0].runner.prefill = prefill  # type: ignore[method-assign]
    engine.release(0)
    engine.submit(12, request(0, 20, 5))
    run(engine, lambda: 12 in heard.finish)
    assert heard.finish[12] is Finish.LENGTH


def test_a_device_out_of_memory_loses_nothing(closing: list[Fleet]) -> None:
    models = checkpoints(2)
    asked = [request(0, 30, 40, seed, sampling=Sampling(0.0)) for seed in range(4)]
    wanted = expected(models, asked, closing)
    fleet = fleet_of(models, 3.0)
    closing.append(fleet)
    engine, heard = fleet.engine, Listener(fleet.engine)
    runner = engine.models[0].runner
    # A step that ran ahead of the state is only dropped.
    full = Failing(runner.launch_decode, OutOfDeviceMemory("no memory", ""), 5, 6, 20, 21)
    runner.launch_decode = full  # type: ignore[method-assign]
    engine.begin()
    assert together(engine, heard, asked) == wanted
    assert engine.node.state.preempted[0] > 0 and not engine.models[0].quarantined


@pytest.mark.parametrize("verbs", ["core", "full"])
def test_a_load_that_finds_no_memory_loses_nothing(verbs: str, closing: list[Fleet]) -> None:
    models = checkpoints(2)
    asked = [request(seed % 2, 30, 40, seed, sampling=Sampling(0.0)) for seed in range(4)]
    wanted = expected(models, asked, closing)
    fleet = fleet_of(models, 3.0, verbs=verbs)
    closing.append(fleet)
    engine, heard = fleet.engine, Listener(fleet.engine)
    place = engine.models[0].weights._range
    full = Failing(place.materialise, OutOfDeviceMemory("no memory", ""), 3, 4)
    place.materialise = full  # type: ignore[method-assign]
    engine.begin()
    assert together(engine, heard, asked) == wanted and full.calls > 4
    assert not engine.models[0].quarantined


def test_a_save_that_finds_no_room_is_computed_again(closing: list[Fleet]) -> None:
    models = checkpoints(1)
    asked = [request(0, 30, 40, seed, sampling=Sampling(0.0)) for seed in range(4)]
    wanted = expected(models, asked, closing)
    fleet = fleet_of(models, 3.0)
    closing.append(fleet)
    engine, heard, s = fleet.engine, Listener(fleet.engine), fleet.engine.node.state
    full = Failing(engine.host_kv.save, HostFull("no room", ""), 2)
    engine.host_kv.save = full  # type: ignore[method-assign]
    verb = decide_by_hand(engine)
    assert engine.preload(0)
    engine.begin()
    for number, one in enumerate(asked):
        engine.submit(number, one)
    run(engine, lambda: all(len(heard.tokens.get(n, [])) > 2 for n in range(4)))
    verb(0, OUT)
    run(engine, lambda: full.calls == 4 and s.saved[0] == 3)
    assert s.kv_dropped[0] == 1 and s.queue_len[0] == 1
    assert engine.preload(0)
    run(engine, lambda: len(heard.finish) == 4)
    assert [heard.tokens[n] for n in range(4)] == wanted
    run(engine, lambda: s.in_system == 0 and engine.models[0].pool.blocks == 0)
    assert s.host_kv_bytes == engine.host_kv.used_bytes == s.saving_blocks[0] == 0


def test_a_model_that_never_finds_memory_is_quarantined(closing: list[Fleet]) -> None:
    engine, heard = one_model(closing)

    def full(*bounds: int) -> None:
        raise OutOfDeviceMemory("no memory", "")

    engine.models[0].weights._range.materialise = full  # type: ignore[method-assign]
    engine.submit(0, request(0, 20, 5))
    engine.submit(1, request(1, 20, 5))
    run(engine, lambda: len(heard.finish) == 2)
    assert heard.finish == {0: Finish.ERROR, 1: Finish.LENGTH} and engine.models[0].quarantined


def test_a_full_queue_refuses(closing: list[Fleet], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, heard = one_model(closing)
    for number in range(300):
        engine.submit(number, request(0, 4, 2))
    run(engine, lambda: len(heard.finish) + len(heard.refused) == 300)
    assert len(heard.refused) == 300 - 256 and set(heard.refused.values()) == {"queue_full"}


def test_many_requests_reuse_the_table(
    closing: list[Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmrl.deploy.node.CAPACITY", 64)
    engine, heard = one_model(closing)
    assert len(engine.node.requests) == 64
    number = 0
    for _ in range(20):
        for _ in range(20):
            engine.submit(number, request(number % 2, 5, 3, number))
            number += 1
        run(engine, lambda: engine.open_requests <= 5)
    run(engine, lambda: engine.open_requests == 0)
    assert len(heard.finish) == 400 and not heard.refused
    assert {len(tokens) for tokens in heard.tokens.values()} == {3}


def test_an_operator_pins_and_preloads(closing: list[Fleet]) -> None:
    engine, heard = one_model(closing, memory=0.7)
    s = engine.node.state
    assert engine.preload(1)
    engine.begin()
    run(engine, lambda: s.landed[1] == s.pieces[1])
    engine.set_pinned(1, True)
    engine.submit(1, request(0, 20, 5))
    for _ in range(50):
        engine.run_instant()
    assert s.landed[1] == s.pieces[1] and engine.models[1].weights.granted == {0, 1, 2, 3, 4}
    engine.set_pinned(1, False)
    run(engine, lambda: 1 in heard.finish)
    assert heard.finish[1] is Finish.LENGTH
    assert next(d.by for d in engine.decisions) == "operator"


def test_an_engine_goes_on_with_the_orders_of_the_one_before(closing: list[Fleet]) -> None:
    """Without its policy, where that is gone."""
    engine, _ = one_model(closing, policy="slack")
    follow(engine, Orders("lru", "full", pinned={"m1": True}))
    assert engine.adapter.name == "lru" and list(engine.node.state.pinned[:2]) == [False, True]
    engine, _ = one_model(closing, policy="slack")
    follow(engine, Orders("gone", "full", pinned={"m0": True}))
    assert engine.adapter.name == "slack" and engine.node.state.pinned[0]


def test_a_trained_policy_serves(closing: list[Fleet]) -> None:
    """The exported network itself, with random weights and a prior that it follows."""
    engine, heard = one_model(closing, 0.75, decision_deadline=60.0)
    card = Policy(lambda count: None, full_verbs=True, prior=True).card
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(0, 0.1, shape) for name, shape in card.shapes().items()}
    weights["beta"] = np.full(card.shapes()["beta"], 3.0)
    floats = {name: np.asarray(value, np.float32) for name, value in weights.items()}
    engine.adapter.policy = ExportedPolicy(card, floats)
    for number in range(4):
        engine.submit(number, request(number % 2, 40, 20, number))
    run(engine, lambda: len(heard.finish) == 4)
    assert set(heard.finish.values()) == {Finish.LENGTH}
    assert engine.decisions and {d.by for d in engine.decisions} == {"policy"}
    assert not engine.adapter.fallbacks and engine.decision_latencies_s


@pytest.mark.parametrize("why", ["deadline", "not_finite", "error"])
def test_the_champion_serves_where_the_policy_does_not(why: str, closing: list[Fleet]) -> None:
    """A policy that thinks for ever, says NaN or raises: the loop goes on, everybody is served."""
    deadline_s = 0.02 if why == "deadline" else HANGS_S
    engine, heard = one_model(closing, 0.75, decision_deadline=deadline_s)
    told = threading.Event()

    def scores(count: int) -> Any:
        if why == "deadline":
            told.wait()
        if why == "error":
            raise RuntimeError("a bug")
        return np.full(count, np.nan)

    engine.adapter.policy = Policy(scores, full_verbs=True)
    for number in range(4):
        engine.submit(number, request(number % 2, 40, 20, number))
    try:
        run(engine, lambda: len(heard.finish) == 4)
    finally:
        told.set()
    assert set(heard.finish.values()) == {Finish.LENGTH}
    assert set(engine.adapter.fallbacks) == {why} and engine.adapter.fallbacks[why] > 1
    assert engine.decisions and {d.by for d in engine.decisions} == {"champion"}


def test_no_token_changes_while_the_clock_jumps(
    closing: list[Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = checkpoints(2)
    asked = [one for _, one in script(5, 8, 2)]
    wanted = expected(models, asked, closing)
    rng, real, off_ns = np.random.default_rng(0), time.monotonic_ns, [0]

    def jumping() -> int:
        if rng.random() < 0.1:
            off_ns[0] = int(rng.integers(-(10**9), 10**9))
        return real() + off_ns[0]

    monkeypatch.setattr("mmrl.deploy.clock.time", SimpleNamespace(monotonic_ns=jumping))
    fleet = fleet_of(models, 0.75)
    closing.append(fleet)
    engine, heard = fleet.engine, Listener(fleet.engine)
    engine.begin()
    assert together(engine, heard, asked) == wanted


def test_a_clock_that_jumps_back_does_no_harm(
    closing: list[Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [10**12]
    monkeypatch.setattr("mmrl.deploy.clock.time.monotonic_ns", lambda: now[0])
    clock = RealTime()
    now[0] += 5_000
    assert clock.now_ns() == 5_000
    now[0] -= 10**9
    assert clock.now_ns() == 5_000
    now[0] += 2 * 10**9
    assert clock.now_ns() == 10**9 + 5_000


def test_decisions_say_why(closing: list[Fleet]) -> None:
    engine, heard = one_model(closing, memory=0.75, verbs="core")
    for number in range(6):
        engine.submit(number, request(number % 2, 50, 30, number))
    run(engine, lambda: len(heard.finish) == 6)
    reasons = [(d.verb, d.reason) for d in engine.decisions]
    assert any(verb == "level100" and "the oldest" in words for verb, words in reasons)
    assert all(d.by == "policy" and d.model in ("m0", "m1") for d in engine.decisions)


def test_who_gives_way_says_to_whom(closing: list[Fleet]) -> None:
    engine, heard = one_model(closing, memory=0.75, verbs="full")
    verb, s = decide_by_hand(engine), engine.node.state
    engine.call(lambda: verb(0, LEVEL_100))
    engine.submit(1, request(0, 50, 400))
    engine.submit(2, request(1, 50, 30))
    run(engine, lambda: len(heard.tokens.get(1, [])) > 3)
    waits = r"m1 \(1 waits for \d\.\d s, target 2 s\) · itself: 1 under way"
    for kind, words in (
        (PAUSE, "gives way to " + waits),
        (OUT, "makes room for " + waits),
        (LEVEL_25, "keeps 25% of its layers, makes room for " + waits),
        (LEVEL_0, "keeps only its base weights, makes room for " + waits),
    ):
        assert re.fullmatch(words, reason(engine.node, engine.names, 0, kind))
    s.now_ns = engine.clock.now_ns()
    wants = reason(engine.node, engine.names, 1, LEVEL_50)
    assert re.fullmatch(r"wants 50% of its layers: 1 waits for \d\.\d s, target 2 s", wants)
    engine.cancel(1)
    engine.cancel(2)
    run(engine, lambda: engine.open_requests == 0 and not s.in_system)
    assert re.fullmatch(r"idle for \d+\.\d s", reason(engine.node, engine.names, 0, OUT))
    assert reason(engine.node, engine.names, 1, LEVEL_0) == "idle since the start"
