"""`open_fleet`: from a configuration to an engine with every model's weights in host memory.

What it finds wrong (a model that cannot fit, too little host memory, a broken checkpoint) is said
before the first gigabyte is read.
"""

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mmrl.agents.export import DEFAULT, ExportedPolicy, load_policy
from mmrl.deploy.adapter import FALLBACKS, DeployAdapter
from mmrl.deploy.checkpoint import Checkpoint
from mmrl.deploy.clock import Clock
from mmrl.deploy.config import ModelConfig, ServeConfig
from mmrl.deploy.engine import Engine
from mmrl.deploy.graphs import GraphPool
from mmrl.deploy.hardware import device_name, find_device, usable_bytes, used_bytes
from mmrl.deploy.known import find_profiles, model_dtype, notes_on
from mmrl.deploy.kv import HostKV, KVPool
from mmrl.deploy.memory import (
    DeviceMemory,
    HostArena,
    host_available_bytes,
    size_text,
)
from mmrl.deploy.node import LiveNode, ModelCosts, NodeNumbers
from mmrl.deploy.protocol import ModelInfo, ModelState, NodeState
from mmrl.deploy.runner import ModelRunner
from mmrl.deploy.served import ServedModel
from mmrl.deploy.streaming import StreamSlots
from mmrl.deploy.warm import warm_up
from mmrl.deploy.weights import ModelWeights, host_buffers, host_bytes
from mmrl.errors import InputError, nearest
from mmrl.node.memory import free_bytes, weight_bytes
from mmrl.node.state import BLOCK_TOKENS, PREFILL, SAVING
from mmrl.profiles.schema import Profile
from mmrl.rules import Rule, get_rule, rule_names
from mmrl.scenarios.targets import TargetNumbers

CHAMPION = "slack"  # the rule that decides where the policy does not
LEAST_TOKENS = 1024  # of KV that the largest model must have room for

Progress = Callable[[str, int, int], None]


@dataclass
class Fleet:
    """An engine and what is known about its models.

    Attributes:
        engine: Ready to begin.
        infos: The models, as the front needs to know them.
        notes: What a user should know, for example which costs are derived.
    """

    engine: Engine
    infos: tuple[ModelInfo, ...]
    notes: tuple[str, ...]
    device: torch.device
    started_s: float
    memory: DeviceMemory
    _slots: StreamSlots
    arenas: tuple[HostArena, ...]

    def close(self) -> None:
        """Give device and host memory back; the engine must be closed before."""
        gc.unfreeze()
        for model in self.engine.models:
            model.weights.close()
            model.pool.close()
        self._slots.close()
        self.memory.close()
        self.engine.host_kv.close()
        for arena in self.arenas:
            arena.close()

    def picture(self) -> NodeState:
        """Return a picture of the node now."""
        engine, node = self.engine, self.engine.node
        s = node.state
        latencies, engine.decision_latencies_s = engine.decision_latencies_s, []
        return NodeState(
            time_s=time.time(),
            started_s=self.started_s,
            device=device_name(self.device),
            policy=engine.adapter.name,
            champion=engine.adapter.champion.name,
            reverted=engine.adapter.reverted,
            draining=False,
            budget_bytes=int(s.budget_bytes),
            reserve_bytes=int(s.reserve_bytes),
            free_bytes=int(free_bytes(s)),
            host_kv_bytes=int(s.host_kv_bytes),
            host_kv_limit_bytes=int(s.host_kv_limit_bytes),
            h2d_busy_s=s.h2d_busy_ns / 1e9,
            d2h_busy_s=s.d2h_busy_ns / 1e9,
            compute_s=float(s.gpu_busy_ns.sum()) / 1e9,
            decisions_asked=int(s.decisions),
            illegal_actions=int(s.illegal_actions),
            fallbacks={why: engine.adapter.fallbacks[why] for why in FALLBACKS},
            decision_latencies_s=tuple(latencies),
            overhead_s=engine.overhead_ns / 1e9,
            models=tuple(self._model(m) for m in range(len(self.infos))),
            decisions=tuple(engine.decisions),
        )

    def _model(self, m: int) -> ModelState:
        node, info, served = self.engine.node, self.infos[m], self.engine.models[m]
        s, r = node.state, node.requests
        states = [int(r[row]["state"]) for row in s.begun[m, : s.begun_len[m]]]
        running = sum(PREFILL <= state < SAVING for state in states)
        oldest = r[s.queue[m, 0]]["arrival_ns"] if s.queue_len[m] else s.now_ns
        return ModelState(
            name=info.name,
            pieces=int(s.pieces[m]),
            landed=int(s.landed[m]),
            target=int(s.target[m]),
            weight_bytes=info.weight_bytes,
            resident_bytes=int(weight_bytes(s, m, s.landed[m])),
            kv_bytes=int(s.kv_blocks[m] * s.block_bytes[m]),
            queued=int(s.queue_len[m]),
            running=running,
            suspended=len(states) - running,
            oldest_wait_s=max(0.0, float(self.engine.clock.now_ns() - oldest) / 1e9)
            if s.queue_len[m]
            else 0.0,
            ttft_s=info.ttft_s,
            tpot_s=info.tpot_s,
            paused=bool(s.paused[m]),
            focus=bool(s.focus == m),
            pinned=bool(s.pinned[m]),
            quarantined=served.quarantined,
            loads=int(s.loads[m]),
            outs=int(s.outs[m]),
            idle_evictions=int(s.idle_evictions[m]),
            preempted=int(s.preempted[m]),
            kv_dropped=int(s.kv_dropped[m]),
            load_bytes=int(s.load_bytes[m]),
            stream_bytes=int(s.stream_bytes[m]),
            kv_save_bytes=int(s.kv_save_bytes[m]),
            kv_restore_bytes=int(s.kv_restore_bytes[m]),
            prefill_tokens=int(s.prefill_tokens[m]),
            decode_tokens=int(s.decode_tokens[m]),
            compute_s=s.gpu_busy_ns[m] / 1e9,
        )


def open_fleet(
    config: ServeConfig,
    progress: Progress | None = None,
    clock: Clock | None = None,
    checkpoints: list[Checkpoint] | None = None,
    warm: bool = True,
) -> Fleet:
    """Open every checkpoint, check that the fleet can be served, and read the weights.

    Args:
        config: What to serve.
        progress: Told (model, bytes read, bytes in all) while weights are read.
        clock: Time of the engine; real unless given.
        checkpoints: The models' checkpoints, where they are not read from their paths. Models
            with the same object share one copy of the weights on the host.
        warm: Run the models once if there is a GPU, and set apart what that takes; without it,
            what their profiles say.

    Raises:
        InputError: Something in the configuration cannot be served; the remedy says why.
    """
    device = find_device(config.node.device)
    opened = checkpoints or [Checkpoint.open(m.path, model_dtype(m)) for m in config.models]
    _check_host_memory(config, opened)
    found = find_profiles(config, opened, device, real_time=clock is None or clock.real)
    policy = find_policy(config.node.policy)
    full_verbs = _full_verbs(config, policy)
    before = used_bytes(device) if device.type == "cuda" else 0
    place = _take_memory(config, opened, [one.profile for one in found], device, full_verbs)
    served, arenas = _read_models(config.models, opened, place, progress)
    reserve = place.reserve_bytes
    if warm and device.type == "cuda":
        reserve = _warm(config, opened, place, served, before, full_verbs)
    costs = [
        _costs(model, (model.targets or config.node.targets).numbers, one.profile, live)
        for model, one, live in zip(config.models, found, served, strict=True)
    ]
    numbers = NodeNumbers(
        budget_bytes=place.budget_bytes,
        reserve_bytes=reserve,
        host_kv_limit_bytes=int(config.node.host_kv),
        full_verbs=full_verbs,
        dispatch=config.node.dispatch,
    )
    node, adapter = _decided(costs, numbers, policy, config.node.decision_deadline)
    host_kv = HostKV(int(config.node.host_kv), page_locked=device.type == "cuda")
    engine = Engine(served, node, adapter, host_kv, device, clock)
    _prepare(engine, config.models)
    infos = tuple(map(_info, config.models, opened, costs))
    name = f"{DEFAULT}, the shipped one" if adapter.name == DEFAULT else adapter.name
    here = (
        f"{device_name(device)}, {size_text(place.budget_bytes)} for "
        f"{size_text(sum(info.weight_bytes for info in infos))} of weights; "
        f"policy {name}; it loads models {'whole or in part' if full_verbs else 'whole'}"
    )
    notes = (*notes_on(found), here)
    if device.type == "cuda":
        # A pass over all that lives as long as the fleet can take a tenth of a second.
        gc.collect()
        gc.freeze()
    return Fleet(
        engine, infos, notes, device, time.time(), place.memory, place.slots, tuple(arenas)
    )


@dataclass(frozen=True)
class _Place:
    """Where a fleet lives on the device: its budget, and what is set apart of it."""

    budget_bytes: int
    reserve_bytes: int
    memory: DeviceMemory
    slots: StreamSlots
    pools: list[KVPool]


def _take_memory(
    config: ServeConfig,
    opened: list[Checkpoint],
    profiles: list[Profile],
    device: torch.device,
    full_verbs: bool,
) -> _Place:
    """Check the budget and make the streaming slots and the KV pools in it.

    Raises:
        InputError: The device has less, or a model can never run.
    """
    usable = usable_bytes(device)
    budget = int(config.node.memory or usable)
    if budget > usable:
        raise InputError(
            f"node.memory: {size_text(budget)}, but {size_text(usable)} are "
            f"usable on {device_name(device)}",
            "lower it",
        )
    workspace = max(profile.workspace_bytes for profile in profiles)
    if device.type == "cuda":
        workspace += sum(profile.graphs_bytes for profile in profiles)
    slot_bytes = max(checkpoint.layer_bytes for checkpoint in opened) if full_verbs else 0
    _check_budget(config, opened, budget, workspace + 2 * slot_bytes, full_verbs)
    memory = DeviceMemory(device, budget - workspace)
    slots = StreamSlots(memory, slot_bytes)
    pools = [KVPool(memory, c.layers, c.kv_heads, c.head_dim, c.dtype) for c in opened]
    reserve = workspace + slots.device_bytes + sum(pool.slack_bytes for pool in pools)
    return _Place(budget, reserve, memory, slots, pools)


def _warm(
    config: ServeConfig,
    opened: list[Checkpoint],
    place: _Place,
    served: list[ServedModel],
    before: int,
    full_verbs: bool,
) -> int:
    """Run the models once; return the bytes that they then need beside weights and KV.

    Raises:
        InputError: With these set apart a model can never run.
    """
    seen = warm_up(served, place.memory, before)
    workspace = seen.total if full_verbs else seen.total - seen.stream
    _check_budget(
        config, opened, place.budget_bytes, workspace + place.slots.device_bytes, full_verbs
    )
    place.memory.set_budget(place.budget_bytes - workspace)
    return workspace + place.slots.device_bytes + sum(pool.slack_bytes for pool in place.pools)


def _read_models(
    models: Sequence[ModelConfig],
    opened: list[Checkpoint],
    place: _Place,
    progress: Progress | None,
) -> tuple[list[ServedModel], list[HostArena]]:
    """Read the weights, one copy of each checkpoint, and make what runs the models."""
    page_locked = place.memory.device.type == "cuda"
    graphs = GraphPool()
    arenas: dict[int, HostArena] = {}  # by identity of the checkpoint
    buffers: dict[int, list[torch.Tensor]] = {}
    served = []
    for model, checkpoint, pool in zip(models, opened, place.pools, strict=True):
        if id(checkpoint) not in arenas:
            arena = HostArena(host_bytes(checkpoint.pieces), page_locked)
            arenas[id(checkpoint)] = arena
            buffers[id(checkpoint)] = _read(model.name, checkpoint, arena, progress)
        weights = ModelWeights(
            checkpoint.build(),
            checkpoint.pieces,
            checkpoint.layers_path,
            buffers[id(checkpoint)],
            place.memory,
            place.slots,
        )
        context = min(checkpoint.max_context, model.max_context or checkpoint.max_context)
        runner = ModelRunner(weights.module, pool, context, checkpoint.eos, graphs)
        served.append(ServedModel(model.name, weights, pool, runner, frozenset(checkpoint.eos)))
    return served, list(arenas.values())


def _read(
    name: str, checkpoint: Checkpoint, arena: HostArena, progress: Progress | None
) -> list[torch.Tensor]:
    """Read a model's weights into its arena of host memory; return its pieces there."""
    buffers = host_buffers(arena, checkpoint.pieces)
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(name, done, checkpoint.tensor_bytes)

    checkpoint.read_into(buffers, count)
    return buffers


def _costs(
    model: ModelConfig, targets: TargetNumbers, profile: Profile, live: ServedModel
) -> ModelCosts:
    """Return what the state knows of a model."""
    weights = live.weights
    return ModelCosts(
        profile,
        weights.layers,
        weights.piece_bytes[0],
        max(weights.piece_bytes[1:]),
        live.pool.block_bytes,
        targets,
        model.batch,
    )


def _decided(
    costs: list[ModelCosts],
    numbers: NodeNumbers,
    policy: ExportedPolicy | Rule,
    deadline_s: float,
) -> tuple[LiveNode, DeployAdapter]:
    """Make the node and who decides on it, with everything compiled that needs it."""

    def decider(node: LiveNode) -> DeployAdapter:
        tables = node.decode_tables, node.prefill_tables
        return DeployAdapter(policy, get_rule(CHAMPION), *tables, deadline_s=deadline_s)

    _compile(LiveNode.of(costs, numbers), decider)
    node = LiveNode.of(costs, numbers)
    return node, decider(node)


def _prepare(engine: Engine, models: Sequence[ModelConfig]) -> None:
    """Pin and load the models that are to be so from the start.

    Raises:
        InputError: One does not fit beside those before it.
    """
    for m, model in enumerate(models):
        if model.pin:
            engine.set_pinned(m, True)
        if model.preload and not engine.preload(m):
            raise InputError(
                f"models.{m}.preload: {model.name} does not fit beside those before it",
                "raise node.memory or preload fewer models",
            )


def _compile(node: LiveNode, decider: Callable[[LiveNode], DeployAdapter]) -> None:
    """Use everything that is compiled once, on a node that serves nothing."""
    adapter = decider(node)
    node.submit(0, 0, 1, 1)
    node.start_work()
    node.foresee()
    node.foresee_stream()
    node.advance(node.next_event_ns())
    node.end_compute()
    node.end_link_bound()
    node.settle()
    node.kv_changes()
    node.begin_decision()
    node.legal(0, 0)
    node.look()
    node.act(adapter.decide(node.nodes, node.table).action)
    adapter.reverted = True
    adapter.decide(node.nodes, node.table)
    node.preload(0)
    node.fail_load()
    node.fail_save()
    node.end_output(0)
    node.fail_iteration(0, link_bound=False, out=True)
    node.cancel(0)
    adapter.close()


def find_policy(name: str, field: str = "node.policy") -> ExportedPolicy | Rule:
    """Return the policy of a name: the shipped one's, a rule's, or the folder of a trained one.

    Args:
        name: What was asked for.
        field: Where it was, for the error.

    Raises:
        InputError: There is none, or it cannot be read.
    """
    if name in rule_names():
        return get_rule(name)
    if name != DEFAULT and not os.path.exists(name):  # False too for what cannot be a path
        raise InputError(
            f"{field}: '{name}' is neither a rule nor the folder of a trained policy",
            nearest(name, [*rule_names(), DEFAULT])
            or f"rules: {', '.join(rule_names())}; {DEFAULT} is the shipped policy",
        )
    try:
        return load_policy(name)
    except InputError as error:
        remedies = filter(None, (error.remedy, "name a rule, such as slack"))
        raise InputError(f"{field}: {error.message}", ", or ".join(remedies)) from error


def _full_verbs(config: ServeConfig, policy: ExportedPolicy | Rule) -> bool:
    if config.node.verbs is not None:
        return config.node.verbs == "full"
    return policy.full_verbs if isinstance(policy, ExportedPolicy) else True


def _check_host_memory(config: ServeConfig, opened: list[Checkpoint]) -> None:
    """Refuse a fleet whose weights do not fit in host memory beside the saved KV cache.

    Raises:
        InputError: They do not.
    """
    needed = {
        model.name: host_bytes(checkpoint.pieces)
        for m, (model, checkpoint) in enumerate(zip(config.models, opened, strict=True))
        if not any(checkpoint is other for other in opened[:m])  # they share one copy
    }
    available = host_available_bytes()
    total = sum(needed.values()) + int(config.node.host_kv)
    if total > available:
        largest = max(needed, key=lambda name: needed[name])
        raise InputError(
            f"the fleet needs {size_text(total)} of host memory ({largest} alone "
            f"{size_text(needed[largest])}), but {size_text(available)} are available",
            "leave models out, or lower node.host_kv",
        )


def _check_budget(
    config: ServeConfig, opened: list[Checkpoint], budget: int, reserve: int, full_verbs: bool
) -> None:
    """Refuse a model that the budget can never serve.

    Raises:
        InputError: One needs more.
    """
    for model, checkpoint in zip(config.models, opened, strict=True):
        weights = checkpoint.base_bytes if full_verbs else checkpoint.weight_bytes
        tokens = min(LEAST_TOKENS, model.max_context or checkpoint.max_context)
        kv = (tokens + 2 * BLOCK_TOKENS) * checkpoint.kv_bytes_per_token
        if weights + kv + reserve > budget:
            what = "base weights" if full_verbs else "weights"
            raise InputError(
                f"{model.name} can never run: {size_text(weights)} of {what}, "
                f"{size_text(reserve)} reserved and {size_text(kv)} of KV cache are more than "
                f"the budget of {size_text(budget)}",
                f"set node.memory to at least {size_text(weights + kv + reserve)}"
                + ("" if full_verbs else ', or node.verbs = "full" to stream its layers'),
            )


def _info(model: ModelConfig, checkpoint: Checkpoint, costs: ModelCosts) -> ModelInfo:
    context = checkpoint.max_context
    return ModelInfo(
        name=model.name,
        path=str(checkpoint.path),
        max_context=min(context, model.max_context or context),
        vocabulary=checkpoint.vocabulary,
        ttft_s=(costs.targets.batch_ttft_ns if costs.batch else costs.targets.ttft_ns) / 1e9,
        tpot_s=0.0 if costs.batch else costs.targets.tpot_ns / 1e9,
        weight_bytes=checkpoint.weight_bytes,
    )
