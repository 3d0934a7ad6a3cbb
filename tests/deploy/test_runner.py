"""Chunked prefill and batched decode over the pool give, token for token, what generate gives."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl.deploy.kv import BLOCK_TOKENS, HostKV, KVPool
from mmrl.deploy.memory import DeviceMemory
from mmrl.deploy.runner import DecodeInput, ModelRunner
from mmrl.deploy.sampling import Choice
from tests.deploy.families import CONFIGS, MAX_CONTEXT, generated, kv_shape, model, prompt

CPU = torch.device("cpu")
GREEDY = Choice()


class Node:
    """A model over a small pool whose unused blocks hold NaN, with sequences that come and go."""

    def __init__(self, family: str, module: torch.nn.Module | None = None, eos: int = 0) -> None:
        layers, kv_heads, head_dim = kv_shape(family)
        memory = DeviceMemory(CPU, 64 << 20)
        self.pool = KVPool(memory, layers, kv_heads, head_dim, torch.float32, capacity=60)
        self.pool.data.fill_(torch.nan)
        self.host = HostKV(16 << 20, page_locked=False)
        self.runner = ModelRunner(module or model(family), self.pool, MAX_CONTEXT, [eos])
        self.tokens: dict[int, list[int]] = {}
        self.prompts: dict[int, int] = {}
        self.prefilled: dict[int, int] = {}
        self.sampling: dict[int, Choice] = {}

    def add(self, key: int, tokens: list[int], sampling: Choice = GREEDY) -> None:
        self.tokens[key] = list(tokens)
        self.prompts[key] = len(tokens)
        self.prefilled[key] = 0
        self.sampling[key] = sampling

    def output(self, key: int) -> tuple[int, ...]:
        return tuple(self.tokens[key][self.prompts[key] :])

    def ready(self, key: int) -> bool:
        return self.prefilled[key] == len(self.tokens[key]) - 1 and self.output(key) != ()

    def resize(self, key: int, tokens: int) -> None:
        before = set(self.pool.table(key).tolist())
        self.pool.resize(key, -(-tokens // BLOCK_TOKENS))
        for block in before - set(self.pool.table(key).tolist()):
            self.pool.data[block] = torch.nan

    def prefill(self, key: int, count: int) -> None:
        tokens, start = self.tokens[key], self.prefilled[key]
        chunk = tokens[start : start + count]
        last = start + len(chunk) == len(tokens)
        self.resize(key, start + len(chunk))
        sampling = self.sampling[key] if last else None
        token = self.runner.prefill(chunk, start, self.pool.table(key), sampling, resident=True)
        self.prefilled[key] = start + len(chunk)
        assert (token is None) != last
        if token is not None:
            tokens.append(token)

    def decode(self, keys: list[int]) -> None:
        batch = []
        for key in keys:
            tokens = self.tokens[key]
            self.resize(key, len(tokens))
            table = self.pool.table(key)
            batch.append(DecodeInput(tokens[-1], len(tokens) - 1, table, self.sampling[key]))
        for key, token in zip(keys, self.runner.decode(batch, resident=True), strict=True):
            self.tokens[key].append(token)
            self.prefilled[key] += 1

    def decode_twice(self, first: list[int], second: list[int]) -> None:
        """Launch both steps before the first one's tokens are known."""
        waits = []
        for later, keys in enumerate((first, second)):
            batch = []
            for key in keys:
                later_here = later if key in first else 0
                position = len(self.tokens[key]) - 1 + later_here
                self.resize(key, position + 1)
                token = -1 - first.index(key) if later_here else self.tokens[key][-1]
                table = self.pool.table(key)
                batch.append(DecodeInput(token, position, table, self.sampling[key]))
            waits.append(self.runner.launch_decode(batch, resident=True))
        for keys, wait in zip((first, second), waits, strict=True):
            for key, token in zip(keys, wait(), strict=True):
                self.tokens[key].append(token)
                self.prefilled[key] += 1

    def save(self, key: int) -> None:
        self.resize(key, self.prefilled[key])
        self.host.save(self.pool, key)
        self.resize(key, 0)

    def restore(self, key: int) -> None:
        self.resize(key, self.prefilled[key])
        self.host.restore(self.pool, key)
        self.host.free(key)

    def drop(self, key: int) -> None:
        self.resize(key, 0)
        self.prefilled[key] = 0

    def finish(self, key: int, count: int) -> None:
        while not self.ready(key):
            self.prefill(key, MAX_CONTEXT)
        while len(self.output(key)) < count:
            self.decode([key])


@pytest.mark.parametrize("family", CONFIGS)
def test_a_batch_that_changes_gives_what_generate_gives(family: str) -> None:
    """Prompts shorter and longer than blocks, chunks and windows; sequences join and leave."""
    node = Node(family)
    lengths, count = [1, 16, 37, 70], 20
    for key, length in enumerate(lengths):
        node.add(key, prompt(length, key))
        while not node.ready(key):
            node.prefill(key, [70, 5, 18, 33][key])
            if others := [other for other in range(key) if len(node.output(other)) < count]:
                node.decode(others)
    while running := [key for key in range(4) if len(node.output(key)) < count]:
        node.decode(running)
    for key, length in enumerate(lengths):
        expected = generated(family, length, key, count)
        assert node.output(key) == expected
    assert len({token for key in range(4) for token in node.output(key)}) > 15


@pytest.fixture(scope="module", params=CONFIGS)
def preempted(request: pytest.FixtureRequest) -> tuple[str, torch.nn.Module]:
    return request.param, model(request.param)


@settings(max_examples=6)
@given(seed=st.integers(0, 2**32))
def test_preemption_at_any_time_changes_no_token(
    preempted: tuple[str, torch.nn.Module], seed: int
) -> None:
    """Sequences are saved, restored, dropped and moved at random."""
    family, module = preempted
    node = Node(family, module)
    draw = random.Random(seed)
    lengths, count = [3, 29, 50], 12
    saved: set[int] = set()
    for key, length in enumerate(lengths):
        node.add(key, prompt(length, key))
    for _ in range(40):
        key = draw.randrange(3)
        done = len(node.output(key)) >= count
        match draw.choice(["prefill", "decode", "decode", "save", "restore", "drop", "compact"]):
            case "prefill" if key not in saved and not node.ready(key):
                node.prefill(key, draw.randint(1, 40))
            case "decode":
                batch = [k for k in range(3) if node.ready(k) and k not in saved]
                batch = [k for k in batch if len(node.output(k)) < count]
                if batch:
                    node.decode(draw.sample(batch, draw.randint(1, len(batch))))
            case "save" if key not in saved and node.prefilled[key]:
                node.save(key)
                saved.add(key)
            case "restore" if key in saved:
                node.restore(key)
                saved.remove(key)
            case "drop" if key not in saved and not done:
                node.drop(key)
            case "compact":
                node.pool.compact({k for k in range(3) if draw.random() < 0.7})
    for key, length in enumerate(lengths):
        if key in saved:
            node.restore(key)
        node.finish(key, count)
        assert node.output(key) == generated(family, length, key, count)
    assert node.host.used_bytes == 0


def test_random_tokens_do_not_depend_on_company_or_preemption() -> None:
    sampling = Choice(temperature=0.9, top_p=0.95, top_k=50, seed=11)
    alone = Node("llama")
    alone.add(0, prompt(21, 0), sampling)
    alone.finish(0, 25)
    assert alone.output(0) != generated("llama", 21, 0, 25)

    node = Node("llama")
    node.add(0, prompt(21, 0), sampling)
    node.add(1, prompt(40, 1), Choice(temperature=1.3, seed=5))
    node.add(2, prompt(33, 2))
    for key in range(3):
        node.prefill(key, MAX_CONTEXT)
    for step in range(24):
        node.decode([[0, 1, 2], [2, 0], [1, 0]][step % 3])
        if step == 8:
            node.save(0)
            node.restore(0)
        if step == 15:
            node.drop(0)
            node.prefill(0, 30)
            while not node.ready(0):
                node.prefill(0, MAX_CONTEXT)
    assert node.output(0)[:25] == alone.output(0)
    assert node.output(2)[:12] == generated("llama", 33, 2, 12)

    other = Node("llama")
    other.add(0, prompt(21, 0), replace(sampling, seed=12))
    other.finish(0, 25)
    assert other.output(0) != alone.output(0)


def test_no_end_of_sequence_where_it_is_forbidden() -> None:
    expected = generated("llama", 20, 0, 8)
    for place in (0, 4):
        eos = expected[place]
        node = Node("llama", eos=eos)
        node.add(0, prompt(20, 0), replace(GREEDY, no_eos=True))
        node.add(1, prompt(20, 0))
        for key in (0, 1):
            node.prefill(key, MAX_CONTEXT)
        for _ in range(7):
            node.decode([0, 1])
        assert node.output(1) == expected
        assert node.output(0)[:place] == expected[:place]
        assert eos not in node.output(0)


def test_inputs_that_do_not_fit_are_refused() -> None:
    node = Node("llama")
    node.pool.resize(0, 1)
    table = node.pool.table(0)
    with pytest.raises(ValueError, match="do not fit"):
        node.runner.prefill([1] * 17, 0, table, None)
    with pytest.raises(ValueError, match="do not fit"):
        node.runner.prefill([], 0, table, None)
    with pytest.raises(ValueError, match="beyond"):
        node.runner.decode([DecodeInput(1, 16, table, GREEDY)], resident=True)
    with pytest.raises(ValueError, match="1 to 64"):
        node.runner.decode([], resident=True)


def test_a_half_precision_model_stays_close() -> None:
    """In bfloat16 a chunked prefill and decode give the logits of one pass, up to rounding."""
    family = "gemma2"
    tokens = prompt(60, 3)
    full = model(family)
    with torch.inference_mode():
        logits = full(input_ids=torch.tensor([tokens])).logits[0, -1]
    module = model(family, torch.bfloat16)
    layers, kv_heads, head_dim = kv_shape(family)
    memory = DeviceMemory(CPU, 8 << 20)
    pool = KVPool(memory, layers, kv_heads, head_dim, torch.bfloat16)
    runner = ModelRunner(module, pool, MAX_CONTEXT)
    pool.resize(0, 4)
    seen: list[torch.Tensor] = []
    module.register_forward_hook(lambda *call: seen.append(call[2].logits[0, -1].float()))
    runner.prefill(tokens[:31], 0, pool.table(0), None)
    runner.prefill(tokens[31:59], 31, pool.table(0), GREEDY)
    runner.decode([DecodeInput(tokens[59], 59, pool.table(0), GREEDY)], resident=False)
    error = (seen[-1] - logits).norm() / logits.norm()
    assert 0 < error < 0.05
    assert np.corrcoef(seen[-1], logits)[0, 1] > 0.995


@pytest.mark.parametrize("sampling", [GREEDY, Choice(temperature=0.9, top_k=20, seed=3)])
def test_a_step_takes_its_tokens_from_the_step_before(sampling: Choice) -> None:
    """It is launched before that one was waited for; rows change places, and one leaves."""
    outputs = []
    for ahead in (False, True):
        node = Node("llama")
        for key, length in enumerate((5, 20, 33)):
            node.add(key, prompt(length, key), replace(sampling, seed=key))
            node.prefill(key, MAX_CONTEXT)
        for first, second in (([0, 1, 2], [2, 0]), ([1], [1]), ([2, 1, 0], [0, 1, 2])) * 4:
            if ahead:
                node.decode_twice(first, second)
            else:
                node.decode(first)
                node.decode(second)
        outputs.append([node.output(key) for key in range(3)])
    assert outputs[0] == outputs[1] and len(set(outputs[0])) == 3
    if sampling.greedy:
        expected = [generated("llama", length, key, 21) for key, length in enumerate((5, 20, 33))]
        assert outputs[1] == [
            one[: len(out)] for one, out in zip(expected, outputs[1], strict=True)
        ]
