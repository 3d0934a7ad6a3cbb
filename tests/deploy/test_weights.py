"""A model yields the same logits however its weights are split, moved, streamed or abandoned."""

import gc
import mmap
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPTNeoXConfig, OPTConfig

from mmrl.deploy.memory import BudgetExceeded, DeviceMemory, HostArena
from mmrl.deploy.streaming import Abandoned, LinkBoundGate, StreamSlots
from mmrl.deploy.weights import ModelWeights, choose_layers, host_buffers, host_bytes, nested_order
from tests.deploy.pieces import Fixture, cut, llama, model

CPU = torch.device("cpu")
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
LAYER_BYTES = 1 << 20  # room for a layer of any of the tiny models


def logits(module: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return module(input_ids=TOKENS, use_cache=False).logits


class Node:
    """A device with slots, and a thread that copies beside the one that computes."""

    def __init__(self, budget: int = 1 << 30) -> None:
        self.memory = DeviceMemory(CPU, budget)
        self.slots = StreamSlots(self.memory, LAYER_BYTES)
        self.h2d = ThreadPoolExecutor(1)

    def run(
        self,
        weights: ModelWeights,
        gate: LinkBoundGate,
        copies: Callable[[], None],
    ) -> torch.Tensor:
        """Compute inside the gate while copies runs on the other thread."""
        copying = self.h2d.submit(copies)
        try:
            with gate:
                result = logits(weights.module)
        finally:
            copying.result(timeout=60)
        return result


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    yield made
    made.h2d.shutdown()


def hooks(module: nn.Module) -> int:
    return sum(hasattr(submodule, "_hf_hook") for submodule in module.modules())


def at_home(fixture: Fixture) -> bool:
    """Whether every parameter lies in the model's own range, which pieces fill in order."""
    weights = fixture.weights
    named = dict(weights.module.named_parameters())
    start = weights._range.tensor.data_ptr()
    for size, piece in zip(weights.piece_bytes, fixture.pieces, strict=True):
        for spec in piece.tensors:
            if named[spec.name].data_ptr() != start + spec.offset:
                return False
        start += size
    return True


def stream_all(weights: ModelWeights, gate: LinkBoundGate) -> None:
    for layer in gate.streamed:
        weights.stream_layer(layer, gate)


# ------------------------------------------------------------------------ which layers


@pytest.mark.parametrize("layers", range(1, 81))
def test_every_prefix_of_the_nested_order_is_spread_evenly(layers: int) -> None:
    order = nested_order(layers)
    assert sorted(order) == list(range(layers))
    for quarters, residues in [(1, {0}), (2, {0, 2}), (3, {0, 1, 2})]:
        count = -(-quarters * layers // 4)
        assert {*order[:count]} == {i for i in range(layers) if i % 4 in residues}
    for count in range(1, layers + 1):
        held = sorted(order[:count])
        gaps = [b - a for a, b in zip(held, [*held[1:], held[0] + layers], strict=True)]
        assert max(gaps) <= max(4, 2 * -(-layers // count) + 3)


@given(st.data())
def test_what_is_held_is_kept_and_growth_and_shrinking_follow_the_nested_order(
    data: st.DataObject,
) -> None:
    layers = data.draw(st.integers(1, 40))
    held = data.draw(st.sets(st.integers(0, layers - 1)))
    count = data.draw(st.integers(0, layers))
    order = nested_order(layers)
    chosen = choose_layers(held, count, layers)
    assert len(chosen) == count
    assert chosen <= held or chosen >= held
    for i, layer in enumerate(order):
        for later in order[i + 1 :]:
            if (layer in held) == (later in held) and later in chosen:
                assert layer in chosen
    whole = choose_layers(set(), count, layers)
    assert whole == set(order[:count])


def test_layers_that_a_model_does_not_have_are_refused() -> None:
    for held, count in [({4}, 1), (set(), 5), (set(), -1)]:
        with pytest.raises(ValueError):
            choose_layers(held, count, 4)


# ------------------------------------------------------------------------ one thread


def test_a_loaded_model_computes_what_the_original_computes(node: Node) -> None:
    fixture = Fixture(llama(), node.memory, node.slots)
    weights = fixture.weights
    slots_bytes = node.memory.committed_bytes
    assert slots_bytes == node.slots.device_bytes > 0
    weights.set_granted(range(4))
    assert weights.device_bytes == sum(weights.piece_bytes)
    assert node.memory.committed_bytes == slots_bytes + weights.device_bytes
    fixture.load()
    assert weights.landed == {0, 1, 2, 3, 4}
    assert torch.equal(logits(fixture.module), logits(fixture.reference))
    assert hooks(fixture.module) == 0
    weights.set_granted(None)
    assert node.memory.committed_bytes == slots_bytes
    assert (weights.landed, weights.granted) == (set(), None)
    assert not torch.equal(logits(fixture.module), logits(fixture.reference))  # zeros now
    weights.set_granted(range(4))
    fixture.load()
    assert torch.equal(logits(fixture.module), logits(fixture.reference))
    assert at_home(fixture)
    fixture.close()
    assert node.memory.committed_bytes == slots_bytes


def test_tied_weights_stay_one_tensor(node: Node) -> None:
    fixture = Fixture(llama(tied=True), node.memory, node.slots)
    module: Any = fixture.module
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert sum("embed" in spec.name for spec in fixture.pieces[0].tensors) == 1
    fixture.weights.set_granted(range(4))
    fixture.load()
    assert torch.equal(logits(module), logits(fixture.reference))
    untied = cut(model(llama()))
    assert fixture.pieces[0].nbytes < untied[0].nbytes


def test_pieces_must_hold_each_parameter_once(node: Node) -> None:
    pieces = cut(model(llama(2)))
    arena = HostArena(host_bytes(pieces), page_locked=False)
    host = host_buffers(arena, pieces)

    def build(config: Any) -> None:
        ModelWeights(model(config), pieces, "model.layers", host, node.memory, node.slots)

    build(llama(2))
    with pytest.raises(ValueError, match="layers"):
        build(llama(3))
    with pytest.raises(ValueError, match="no piece holds"):
        build(llama(2, attention_bias=True))
    with pytest.raises(ValueError, match="is there twice"):
        build(llama(2, tied=True))
    with pytest.raises(ValueError, match="not"):
        build(llama(2, intermediate_size=256))


def test_host_buffers_are_apart_and_begin_on_pages() -> None:
    pieces = cut(model(llama(2)))
    arena = HostArena(host_bytes(pieces), page_locked=False)
    buffers = host_buffers(arena, pieces)
    assert [b.numel() for b in buffers] == [p.nbytes for p in pieces]
    start = arena.tensor.data_ptr()
    spans = [(b.data_ptr() - start, b.data_ptr() - start + b.numel()) for b in buffers]
    assert all(a % mmap.PAGESIZE == 0 for a, _ in spans)
    assert all(stop <= after for (_, stop), (after, _) in pairwise(spans))
    assert spans[-1][1] <= arena.tensor.numel() == host_bytes(pieces)


def test_pieces_are_claimed_once_and_in_the_order_of_execution(node: Node) -> None:
    weights = Fixture(llama(8), node.memory, node.slots).weights
    weights.set_granted({6, 1, 4})
    assert [weights.claim_piece(3) for _ in range(5)] == [0, 2, 5, 7, None]
    for piece in (2, 0):
        weights.copy_piece(piece)
    assert weights.landed == {0, 2}
    with pytest.raises(RuntimeError, match=r"\[5, 7\] are being copied"):
        weights.set_granted({1})
    with pytest.raises(RuntimeError, match="without memory"):
        weights.copy_piece(1)
    assert weights.granted == {1, 4, 6}


def test_a_piece_has_landed_when_its_copy_was_waited_for(node: Node) -> None:
    weights = Fixture(llama(4), node.memory, node.slots).weights
    weights.set_granted({0})
    begun = [weights.start_piece(piece) for piece in (0, 1)]
    assert not weights.landed
    with pytest.raises(RuntimeError, match=r"\[0, 1\] are being copied"):
        weights.set_granted(None)
    for launched in begun:
        launched.wait()
    assert weights.landed == {0, 1}


def test_what_landed_or_is_on_its_way_is_kept_before_empty_places(node: Node) -> None:
    weights = Fixture(llama(8), node.memory, node.slots).weights
    weights.set_granted(weights.choose(6))
    assert weights.granted == {*nested_order(8)[:6]}
    for _ in range(4):  # base, 0, 1, 2
        piece = weights.claim_piece(6)
        assert piece is not None
        weights.copy_piece(piece)
    on_its_way = weights.claim_piece(6)
    assert on_its_way == 1 + 4
    assert weights.choose(6) == weights.granted
    assert weights.choose(5) > {0, 1, 2, 4}
    assert weights.choose(4) == {0, 1, 2, 4}
    assert weights.choose(3) == {0, 2, 4}  # 1 comes last in the nested order
    before = [weights.choose(count) for count in range(7)]
    weights.copy_piece(on_its_way)
    assert [weights.choose(count) for count in range(7)] == before
    assert weights.choose(8) == {*range(8)}


def test_a_grant_beyond_the_budget_takes_nothing(node: Node) -> None:
    fixture = Fixture(llama(4), node.memory, node.slots)
    weights = fixture.weights
    weights.set_granted({0})
    node.memory.budget_bytes = node.memory.committed_bytes + 2 * weights.piece_bytes[1]
    before = node.memory.committed_bytes
    with pytest.raises(BudgetExceeded):
        weights.set_granted({0, 1, 2, 3})
    assert (weights.granted, node.memory.committed_bytes) == ({0}, before)
    weights.set_granted({1, 2, 3})
    with pytest.raises(BudgetExceeded):
        Fixture(llama(4), node.memory, node.slots).weights.set_granted(())
    with pytest.raises(ValueError):
        weights.set_granted({4})


# ------------------------------------------------------------------------ link-bound iterations


@pytest.mark.parametrize(
    ("config", "path"),
    [
        (llama(5), "model.layers"),
        (llama(5, tied=True), "model.layers"),
        (
            GPTNeoXConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=5,
                num_attention_heads=4,
                vocab_size=160,
            ),
            "gpt_neox.layers",
        ),
        (
            OPTConfig(
                hidden_size=64,
                word_embed_proj_dim=64,
                ffn_dim=128,
                num_hidden_layers=5,
                num_attention_heads=4,
                vocab_size=160,
            ),
            "model.decoder.layers",
        ),
    ],
)
@pytest.mark.parametrize("pull", [False, True])
@pytest.mark.parametrize("held", [set(), {2}, {0, 2, 4}, {0, 1, 2, 3, 4}])
def test_missing_layers_stream_through_the_slots(
    node: Node, config: Any, path: str, pull: bool, held: set[int]
) -> None:
    fixture = Fixture(config, node.memory, node.slots, path)
    weights = fixture.weights
    weights.set_granted(held)
    fixture.load()
    committed = node.memory.committed_bytes
    freed: list[int] = []
    gate = weights.link_bound(
        sorted({*range(5)} - held), pull=pull, freed=lambda: freed.append(len(gate._in_slot))
    )
    result = node.run(weights, gate, lambda: stream_all(weights, gate))
    assert torch.equal(result, logits(fixture.reference))
    assert len(freed) == 5 - len(held)
    assert node.memory.committed_bytes == committed
    assert hooks(fixture.module) == 0
    assert at_home(fixture)


@pytest.mark.parametrize("held", [4, 8])
def test_a_model_computes_while_it_loads(node: Node, held: int) -> None:
    """Starts with the base weights only; the layers come one by one, with streams between."""
    fixture = Fixture(llama(8), node.memory, node.slots)
    weights = fixture.weights
    weights.set_granted(weights.choose(held))
    base = weights.claim_piece(held)
    assert base == 0
    weights.copy_piece(base)
    streamed = sorted({*range(8)} - weights.choose(held))
    gate = weights.link_bound(streamed)
    computed: list[int] = []
    for i, layer in enumerate(weights._layer_modules):
        layer.register_forward_hook(lambda *_, i=i: computed.append(i))
    ahead = []

    def copies() -> None:
        left = list(streamed)
        while (piece := weights.claim_piece(held)) is not None or left:
            if left:
                assert weights.stream_layer(left.pop(0), gate)
            if piece is not None:
                # Nothing that is missing has been computed before it came.
                ahead.append(all(i < piece - 1 or i in streamed for i in computed))
                weights.copy_piece(piece)

    assert torch.equal(node.run(weights, gate, copies), logits(fixture.reference))
    assert ahead == [True] * held
    assert computed == list(range(8))
    assert len(weights.landed) == held + 1


def test_a_slot_is_filled_again_only_after_its_layer_was_computed(node: Node) -> None:
    fixture = Fixture(llama(4), node.memory, node.slots)
    weights = fixture.weights
    weights.set_granted(())
    fixture.load()
    gate = weights.link_bound(range(4))
    assert weights.stream_layer(0, gate)
    assert not gate.slot_free(0)
    assert gate.slot_free(1)
    assert weights.stream_layer(1, gate)
    third = node.h2d.submit(weights.stream_layer, 2, gate)
    assert not gate.slot_free(2)
    done, _ = _wait(third, 0.05)
    assert not done
    first = [*gate._slots.slots[0].tensor[:64].tolist()]
    assert first == weights._host[1][:64].tolist()
    with gate:
        computing = threading.Thread(target=lambda: logits(weights.module))
        computing.start()
        assert third.result(timeout=60)
        assert weights.stream_layer(3, gate)
        computing.join()
        with pytest.raises(ValueError, match="not the next"):
            weights.stream_layer(3, gate)
    assert not weights.stream_layer(3, gate)


def _wait(future: Future[Any], seconds: float) -> tuple[bool, Any]:
    try:
        return True, future.result(timeout=seconds)
    except TimeoutError:
        return False, None


@pytest.mark.parametrize("streamed", [0, 1, 2, 3])
def test_an_abandoned_iteration_ends_at_once_and_leaves_no_trace(node: Node, streamed: int) -> None:
    fixture = Fixture(llama(4), node.memory, node.slots)
    other = Fixture(llama(4), node.memory, node.slots, seed=1)
    for each in (fixture, other):
        each.weights.set_granted(())
        each.load()
    weights = fixture.weights
    gate = weights.link_bound(range(4))
    with ThreadPoolExecutor(1) as compute:

        def iteration() -> None:
            with gate:
                logits(weights.module)

        running = compute.submit(iteration)
        for layer in range(streamed):
            assert weights.stream_layer(layer, gate)
        gate.cancel()
        with pytest.raises(Abandoned):
            running.result(timeout=60)
    assert gate.closed
    for layer in range(4):
        assert not weights.stream_layer(layer, gate)
    assert hooks(fixture.module) == 0
    assert at_home(fixture)
    # The slots serve another model, then this one again.
    for each in (other, fixture):
        again = each.weights.link_bound(range(4))
        result = node.run(each.weights, again, lambda e=each, g=again: stream_all(e.weights, g))
        assert torch.equal(result, logits(each.reference))


def test_a_cancelled_gate_frees_who_waits_for_a_slot(node: Node) -> None:
    fixture = Fixture(llama(4), node.memory, node.slots)
    weights = fixture.weights
    weights.set_granted(())
    fixture.load()
    gate = weights.link_bound(range(4))
    for layer in (0, 1):
        weights.stream_layer(layer, gate)
    waiting = node.h2d.submit(weights.stream_layer, 2, gate)
    gate.cancel()
    assert waiting.result(timeout=60) is False
    with pytest.raises(RuntimeError, match="still open"):
        weights.link_bound(range(4))
    with pytest.raises(Abandoned), gate:
        raise AssertionError("entered")
    assert gate.slot_free(0)
    assert gate.slot_free(1)


def test_an_exception_in_the_forward_pass_frees_everything(node: Node) -> None:
    fixture = Fixture(llama(4), node.memory, node.slots)
    weights = fixture.weights
    weights.set_granted({0})
    fixture.load()
    broken = weights._layer_modules[2].register_forward_pre_hook(lambda *_: 1 / 0)
    gate = weights.link_bound([1, 2, 3])
    with pytest.raises(ZeroDivisionError):
        node.run(weights, gate, lambda: stream_all(weights, gate))
    broken.remove()
    assert hooks(fixture.module) == 0
    again = weights.link_bound([1, 2, 3])
    result = node.run(weights, again, lambda: stream_all(weights, again))
    assert torch.equal(result, logits(fixture.reference))


def test_a_gate_refuses_what_it_could_not_serve(node: Node) -> None:
    fixture = Fixture(llama(4), node.memory, node.slots)
    weights = fixture.weights
    with pytest.raises(RuntimeError, match="base weights"):
        weights.link_bound(range(4))
    weights.set_granted({0})
    fixture.load()
    for streamed in ([1, 2], [3, 2, 1], [1, 2, 3, 3], []):
        with pytest.raises(ValueError, match="have to be streamed"):
            weights.link_bound(streamed)
    gate = weights.link_bound([1, 2, 3])
    with pytest.raises(RuntimeError, match="layers are dropped"):
        weights.set_granted(())
    with pytest.raises(RuntimeError, match="layers are dropped"):
        weights.set_granted(None)
    gate.close()
    weights.set_granted(None)
    small = StreamSlots(node.memory, 1000)
    unslotted = Fixture(llama(4), node.memory, small)
    unslotted.weights.set_granted(())
    unslotted.load()
    with pytest.raises(ValueError, match="slot of 1000 bytes"):
        unslotted.weights.link_bound(range(4))


def test_a_node_that_never_streams_needs_no_slots() -> None:
    memory = DeviceMemory(CPU, 1 << 30)
    slots = StreamSlots(memory, 0)
    assert memory.committed_bytes == slots.device_bytes == 0
    fixture = Fixture(llama(4), memory, slots)
    fixture.weights.set_granted(range(4))
    fixture.weights.copy_piece(0)
    gate = fixture.weights.link_bound(())
    with ThreadPoolExecutor(1) as h2d:
        h2d.submit(fixture.load)
        with gate:
            assert torch.equal(logits(fixture.module), logits(fixture.reference))
    slots.close()


def test_layers_that_an_iteration_streams_may_go_under_it(node: Node) -> None:
    """A surplus is released while the iteration that was started with it waits for its bytes."""
    fixture = Fixture(llama(8), node.memory, node.slots)
    weights = fixture.weights
    weights.set_granted(range(8))
    for _ in range(4):  # base, 0, 1, 2
        piece = weights.claim_piece(8)
        assert piece is not None
        weights.copy_piece(piece)
    late = weights.claim_piece(8)
    assert late == 4
    keep = weights.choose(5)  # the target falls while layer 3 is on the link
    assert keep > {0, 1, 2, 3}
    gate = weights.link_bound(sorted({*range(8)} - keep))

    weights.copy_piece(late)
    weights.set_granted(weights.choose(5))
    assert weights.granted == keep
    piece = weights.claim_piece(5)
    assert piece is not None
    weights.copy_piece(piece)
    assert weights.claim_piece(5) is None
    result = node.run(weights, gate, lambda: stream_all(weights, gate))
    assert torch.equal(result, logits(fixture.reference))


# ------------------------------------------------------------------------ ahead of an iteration


def half_streamed(node: Node, seed: int = 0) -> Fixture:
    fixture = Fixture(llama(5), node.memory, node.slots, seed=seed)
    fixture.weights.set_granted({0, 3})
    fixture.load()
    return fixture


def test_layers_that_come_early_serve_the_next_iteration(node: Node) -> None:
    """Three layers each: the slots go on in turn, so the first of the next has the free one."""
    fixture = half_streamed(node)
    weights = fixture.weights
    gate = weights.link_bound([1, 2, 4])
    for _ in range(3):
        following = gate.following()
        assert following is gate.following() is weights.early_gate
        begun: list[bool] = []

        def copies(gate: LinkBoundGate = gate, begun: list[bool] = begun) -> None:
            while gate.claimed < 3:
                assert gate.stream_next()()
            early = gate.following()
            for _ in range(2):
                begun.append(early.stream_next()())

        assert torch.equal(node.run(weights, gate, copies), logits(fixture.reference))
        assert begun == [True, True]
        assert [slot.user for slot in node.slots.slots] == [following] * 2
        gate = weights.link_bound([1, 2, 4])
        assert gate is following and gate.claimed == 2 and weights.early_gate is None
    gate.close()
    assert [slot.user for slot in node.slots.slots] == [None, None]


def test_an_early_layer_waits_for_the_one_that_computes(node: Node) -> None:
    fixture = half_streamed(node)
    weights = fixture.weights
    gate = weights.link_bound([1, 2, 4])
    gate.stream_next()()
    gate.stream_next()()
    early = gate.following()
    assert not early.next_can_come
    waiting = node.h2d.submit(early.stream_next())
    assert not _wait(waiting, 0.05)[0]
    early.close()  # nobody wants it any more
    assert waiting.result(timeout=60) is False
    result = node.run(weights, gate, lambda: gate.stream_next()())  # type: ignore[arg-type]
    assert torch.equal(result, logits(fixture.reference))


@pytest.mark.parametrize("other", ["layers", "model"])
def test_early_layers_that_nobody_wants_free_their_slots(node: Node, other: str) -> None:
    fixture, second = half_streamed(node), half_streamed(node, seed=1)
    weights = fixture.weights
    gate = weights.link_bound([1, 2, 4])
    early = gate.following()
    result = node.run(weights, gate, lambda: stream_all(weights, gate))
    assert torch.equal(result, logits(fixture.reference))
    assert early.stream_next()() and early.stream_next()()
    if other == "model":
        fixture = second
    else:
        weights.set_granted({0})
    wanted = [1, 2, 4] if other == "model" else [1, 2, 3, 4]
    again = fixture.weights.link_bound(wanted)
    assert again is not early and early.closed and again.claimed == 0
    result = node.run(fixture.weights, again, lambda: stream_all(fixture.weights, again))
    assert torch.equal(result, logits(fixture.reference))


# ------------------------------------------------------------------------ endurance


def rss() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_a_thousand_random_splits_change_no_logit_and_leak_nothing(node: Node) -> None:
    rng = random.Random(5)
    fixtures = [
        Fixture(llama(4), node.memory, node.slots, seed=1),
        Fixture(llama(6, tied=True), node.memory, node.slots, seed=2),
    ]
    expected = [logits(fixture.reference) for fixture in fixtures]
    granule, slots_bytes = node.memory.granule, node.memory.committed_bytes
    node.memory.budget_bytes = slots_bytes + sum(
        sum(fixture.weights.piece_bytes) for fixture in fixtures
    )
    node.memory.budget_bytes -= 3 * granule  # not all of both
    seen = dict.fromkeys(["resident", "streamed", "loading", "abandoned", "out", "refused"], 0)
    flat = 0
    for number in range(1000):
        if number == 200:
            flat = rss()
        which = rng.randrange(2)
        fixture, weights = fixtures[which], fixtures[which].weights
        count = rng.choice([None, *range(weights.layers + 1), weights.layers])
        try:
            weights.set_granted(None if count is None else weights.choose(count))
        except BudgetExceeded:
            seen["refused"] += 1
            fixtures[1 - which].weights.set_granted(None)
            weights.set_granted(weights.choose(count or 0))
        held = sum(fixture.weights.device_bytes for fixture in fixtures)
        assert node.memory.committed_bytes == slots_bytes + held <= node.memory.budget_bytes
        if count is None:
            seen["out"] += 1
            continue
        loads = rng.randrange(-2, count + 2)  # pieces that land before the iteration
        while loads != 0 and (piece := weights.claim_piece(count)) is not None:
            weights.copy_piece(piece)
            loads -= 1
        if 0 not in weights.landed:
            weights.copy_piece(0)
        if len(weights.landed) == weights.layers + 1:
            seen["resident"] += 1
            assert torch.equal(logits(weights.module), expected[which])
            continue
        streamed = sorted({*range(weights.layers)} - weights.choose(count))
        gate = weights.link_bound(streamed)
        cancel_at = rng.choice([None, None, rng.randrange(weights.layers)])
        seen["streamed"] += bool(streamed)
        seen["loading"] += len(weights.landed) < count + 1

        def copies(
            weights: ModelWeights = weights,
            gate: LinkBoundGate = gate,
            count: int = count,
            cancel_at: int | None = cancel_at,
        ) -> None:
            for layer in range(weights.layers):
                if layer == cancel_at:
                    gate.cancel()
                    return
                if layer in gate.streamed:
                    weights.stream_layer(layer, gate)
                elif layer + 1 not in weights.landed:
                    weights.copy_piece(layer + 1)

        try:
            assert torch.equal(node.run(weights, gate, copies), expected[which])
        except Abandoned:
            seen["abandoned"] += 1
        assert hooks(weights.module) == 0
    assert min(seen.values()) > 20, seen
    assert node.memory.peak_bytes <= node.memory.budget_bytes
    assert rss() - flat < 3 << 20  # one layer leaked each time would be 100 MiB
    for fixture in fixtures:
        fixture.close()
    assert node.memory.committed_bytes == slots_bytes
