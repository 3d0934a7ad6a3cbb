"""What transfers take, what they cost a neighbour, and what the engine's loop adds to iterations.

Loads and streamed iterations go through the engine's loop, which decides when each piece starts;
KV goes through the workers that move it.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mmrl.deploy.clock import D2H, H2D
from mmrl.deploy.kv import KVPool
from mmrl.deploy.profiler.raw import Section
from mmrl.deploy.profiler.subject import FIRST_KEY, NotResident, Subject
from mmrl.deploy.profiler.timing import median
from mmrl.deploy.served import Sequence_, ServedModel
from mmrl.deploy.streaming import LinkBoundGate
from mmrl.deploy.transfers import Transfer
from mmrl.deploy.workers import Task
from mmrl.node.actions import LEVEL_0, LEVEL_25, LEVEL_50, LEVEL_75, LEVEL_100, OUT
from mmrl.node.state import BLOCK_TOKENS, DECODE_STEP, PREFILL_CHUNK, SAVED, SEGMENT_STEPS

LEVELS = (LEVEL_100, LEVEL_75, LEVEL_50, LEVEL_25, LEVEL_0)
STREAM_BATCHES = (1, 8, 32)
PROMPT = 128
OUTPUT = 4000
KV_CONTEXTS = (1024, 4096, 16384)
SCATTERED = 8  # sequences that grew side by side, block by block
BESIDE_BATCH, BESIDE_PROMPT = 8, 256
BESIDE_STEPS, LEAST_STEPS, MOST_LOADS = 60, 8, 100
SAVED_TOKENS = 4096
LOOP_SEGMENTS, LOOP_PROMPTS, LOOP_PROMPT, LOOP_LOADS = 8, 12, 112, 3
LOOP_ROOM_BLOCKS = 64  # of KV caches that grow meanwhile


def load(subject: Subject, section: Section) -> None:
    """Measure loads from nothing to each level that fits, into memory that another has left.

    That is what a load finds on a node that is full. The two instances take turns.
    """
    rig, turns = subject.rig, itertools.cycle(subject.names)
    pieces = [piece.nbytes for piece in subject.checkpoint.pieces]
    with _room_for_one(subject):
        for verb in LEVELS:
            if verb > _highest(subject, 1):
                section.skip({"level": _share(verb)}, "does not fit")
                continue

            def once(verb: int = verb) -> float:
                for name in subject.names:
                    rig.level(name, OUT)
                return rig.level(next(turns), verb)

            rig.transfers.clear()
            held = _layers_at(subject, verb)
            nbytes = pieces[0] + sum(pieces[1 : 1 + held])
            section.measure(once, subject.patience(1.0, 3, 8), level=_share(verb), bytes=nbytes)
            if verb == LEVEL_100:
                section.values["copies_s"] = _link_times(subject, ServedModel)
        for name in subject.names:
            rig.level(name, OUT)
    rig.clear()


@contextmanager
def _room_for_one(subject: Subject) -> Iterator[None]:
    """Leave the device memory for the weights of one instance only; none is on it now."""
    memory = subject.rig.fleet.memory
    given = memory.budget_bytes
    weights = sum(subject.model.weights.piece_bytes)
    memory.set_budget(min(given, memory.committed_bytes + weights))
    try:
        yield
    finally:
        memory.set_budget(given)


def stream(subject: Subject, section: Section) -> None:
    """Measure decode steps that stream the missing layers, over level and batch."""
    for batch in STREAM_BATCHES:
        few = (LEVEL_50, LEVEL_0) if batch != 1 and subject.deadline.left_s < 30 else LEVELS[1:]
        _stream(subject, section, batch, few)
    section.values["layer_copies_s"] = _link_times(subject, LinkBoundGate)
    subject.rig.clear()


def _stream(subject: Subject, section: Section, batch: int, levels: Sequence[int]) -> None:
    """Measure at some levels, from the highest on down, while the same sequences go on."""
    rig, name = subject.rig, subject.names[0]
    highest = _highest(subject, batch)
    if highest < LEVEL_0:
        section.skip({"batch": batch}, "no memory for so many sequences")
        return
    rig.level(name, highest)
    numbers = _submit(subject, name, batch, PROMPT)
    rig.until(lambda: all(rig.times[number] for number in numbers))
    last = numbers[-1]
    for verb in levels:
        if verb > highest:
            section.skip({"batch": batch, "level": _share(verb)}, "does not fit")
            continue
        rig.level(name, verb)
        missing = subject.checkpoint.layers - _layers_at(subject, verb)
        section.measure(
            lambda: _next_gap(subject, last),
            subject.patience(1.0, 4, 12),
            warm=2,
            batch=batch,
            level=_share(verb),
            missing_layers=missing,
        )
    _end(subject)


def kv(subject: Subject, section: Section) -> None:
    """Measure saving and restoring sequences, whole ones and ones whose blocks lie scattered."""
    with _pool(subject) as pool:
        longest = subject.longest
        fitting = [tokens for tokens in KV_CONTEXTS if tokens <= longest]
        for tokens in fitting or [longest // 4, longest]:
            pool.resize(FIRST_KEY, tokens // BLOCK_TOKENS)
            _save_and_restore(subject, section, tokens, scattered=False)
            pool.free(FIRST_KEY)
        tokens, kv_bytes = KV_CONTEXTS[1], subject.checkpoint.kv_bytes_per_token
        if tokens <= longest and SCATTERED * tokens * kv_bytes <= subject.room_bytes:
            for blocks in range(1, 1 + tokens // BLOCK_TOKENS):
                for key in range(FIRST_KEY, FIRST_KEY + SCATTERED):
                    pool.resize(key, blocks)
            _save_and_restore(subject, section, tokens, scattered=True)
    if not section.points:
        raise MemoryError("no sequence fits beside the weights and in host memory for KV")


def _save_and_restore(subject: Subject, section: Section, tokens: int, scattered: bool) -> None:
    host_kv, pool, rig = subject.rig.engine.host_kv, subject.model.pool, subject.rig
    nbytes = len(pool.table(FIRST_KEY)) * pool.block_bytes
    point = {"tokens": tokens, "bytes": nbytes, "scattered": scattered}

    def save() -> float:
        host_kv.free(FIRST_KEY)
        done = rig.on_worker(D2H, lambda: host_kv.save(pool, FIRST_KEY))
        return (done.ended_ns - done.begun_ns) / 1e9

    def restore() -> float:
        done = rig.on_worker(H2D, lambda: host_kv.restore(pool, FIRST_KEY))
        return (done.ended_ns - done.begun_ns) / 1e9

    if section.measure(save, subject.patience(0.5), way="save", **point):
        section.measure(restore, subject.patience(0.5), way="restore", **point)
    host_kv.free(FIRST_KEY)


def slowdown(subject: Subject, section: Section) -> None:
    """Measure decode steps beside another's load, a KV save and another's stream.

    Before and after each of these they are measured alone: contexts grow all the while.
    """
    rig, (name, other) = subject.rig, subject.names
    if _highest(subject, BESIDE_BATCH) < LEVEL_100:
        raise NotResident("it does not fit on the device as a whole")
    # What the sections before have left on the device would be unmapped while the other loads.
    rig.fleet.memory.set_budget(rig.fleet.memory.budget_bytes)
    rig.level(name, LEVEL_100)
    numbers = _submit(subject, name, BESIDE_BATCH, BESIDE_PROMPT)
    rig.until(lambda: all(rig.times[number] for number in numbers))
    wanted = _steps_wanted(subject)

    def alone() -> None:
        section.add(_steps(subject, lambda found: found >= wanted), beside="nothing")

    alone()
    with _saving(subject):
        section.add(_steps(subject, lambda found: found >= wanted), beside="save")
    alone()
    room = _highest(subject, 1, others=sum(subject.model.weights.piece_bytes))
    if room < LEVEL_0:
        section.skip({"beside": "load, stream"}, "no memory for a second model")
    else:
        _beside_load(subject, section, other, room)
        alone()
        _beside_stream(subject, section, other)
        alone()
    _end(subject)


def _beside_load(subject: Subject, section: Section, other: str, level: int) -> None:
    """Let another model load again and again; a small one is there before a step has ended."""
    rig, found = subject.rig, list[float]()
    for _ in range(MOST_LOADS):
        rig.steps.clear()
        rig.level(other, level)
        found += _decode_times(subject)
        rig.level(other, OUT)
        if len(found) >= _steps_wanted(subject):
            break
    section.add(found, beside="load")


def _beside_stream(subject: Subject, section: Section, other: str) -> None:
    """Let another model stream all its layers."""
    rig = subject.rig
    rig.level(other, LEVEL_0)
    (number,) = _submit(subject, other, 1, PROMPT)
    rig.until(lambda: bool(rig.times[number]))
    times = _steps(subject, lambda found: len(rig.times[number]) > 4 and found >= BESIDE_STEPS // 2)
    section.add(times, beside="stream")
    section.values["stream_step_s"] = median(rig.gaps(number, 1))
    rig.engine.call(lambda: rig.engine.cancel(number))
    rig.until(lambda: not rig.node.state.decoding[1])


def overhead(subject: Subject, section: Section) -> None:
    """Measure iterations, KV moves and loads in the loop of a busy node, from end to end.

    Beside the model its second instance decodes, where both fit, so that they alternate.
    """
    rig, (name, other) = subject.rig, subject.names
    weights = sum(subject.model.weights.piece_bytes)
    if _highest(subject, BESIDE_BATCH) < LEVEL_100:
        raise NotResident("it does not fit on the device as a whole")
    rig.level(name, LEVEL_100)
    numbers = _submit(subject, name, BESIDE_BATCH, BESIDE_PROMPT)
    if _highest(subject, BESIDE_BATCH, others=weights) == LEVEL_100:
        rig.level(other, LEVEL_100)
        numbers += _submit(subject, other, 1, BESIDE_PROMPT)
    rig.until(lambda: all(rig.times[number] for number in numbers))
    rig.steps.clear()
    count = min(LOOP_SEGMENTS * SEGMENT_STEPS, subject.checkpoint.max_context // 4)
    rig.until(lambda: len(_periods(subject, DECODE_STEP)) >= count)
    context = int(rig.node.state.context_tokens[0]) // BESIDE_BATCH
    for what, first in (("decode", False), ("settle", True)):
        times = _periods(subject, DECODE_STEP, first)
        section.add(times, what=what, batch=BESIDE_BATCH, context_tokens=context)
    tokens = min(LOOP_PROMPT, subject.checkpoint.max_context // 4)
    times = [_prompt_in_loop(subject, tokens) for _ in range(LOOP_PROMPTS)]
    section.add(times, what="prefill", tokens=tokens)
    with _memory_taken_in_turn(subject) as take:
        _moves_in_loop(subject, section, take)
    _end(subject)


def _moves_in_loop(subject: Subject, section: Section, take: Callable[[], None]) -> None:
    """Put the first model out and load it again and again, beside the other's decode steps.

    Its sequences are saved and restored in turn; between the two others ``take`` its memory.
    """
    rig, name, s = subject.rig, subject.names[0], subject.rig.node.state
    times: dict[str, list[float]] = {"save": [], "restore": [], "piece": []}
    nbytes = 0
    for _ in range(LOOP_LOADS):
        rig.transfers.clear()
        rig.level(name, OUT)
        rig.until(lambda: s.save_len == 0 and s.d2h_request < 0)
        take()
        kept = [row for row in rig.node.requests[: s.n_requests] if row["state"] == SAVED]
        blocks = max((int(row["blocks"]) for row in kept), default=0)
        nbytes = blocks * subject.model.pool.block_bytes
        rig.level(name, LEVEL_100)
        rig.until(lambda: int(s.decoding[0]) == BESIDE_BATCH)
        for what, worker, kind in (
            ("save", D2H, Sequence_),
            ("restore", H2D, Sequence_),
            ("piece", H2D, ServedModel),
        ):
            moves = [done for done in rig.transfers if done.worker == worker]
            times[what] += [
                (b.ended_ns - a.ended_ns) / 1e9
                for a, b in itertools.pairwise(moves)
                if isinstance(a.tag.of, kind) and isinstance(b.tag.of, kind)
            ]
    for what, found in times.items():
        size = subject.checkpoint.layer_bytes if what == "piece" else nbytes
        section.add(found, what=what, bytes=size)


@contextmanager
def _memory_taken_in_turn(subject: Subject) -> Iterator[Callable[[], None]]:
    """Yield what has the memory that the weights of one instance have left used elsewhere.

    On a node that is full, loads find memory that is still mapped where others have been.
    """
    memory, sizes = subject.rig.fleet.memory, subject.model.weights.piece_bytes
    given, pool = memory.budget_bytes, subject.model.pool
    room = LOOP_ROOM_BLOCKS * pool.block_bytes + 2 * pool.slack_bytes
    spare = memory.reserve(sum(sizes))

    def take() -> None:
        ends = list(itertools.accumulate(sizes, initial=0))
        for start, stop in itertools.pairwise(ends):
            spare.commit(start, stop)
        spare.decommit(0, ends[-1])

    memory.set_budget(min(given, memory.committed_bytes + room))
    try:
        yield take
    finally:
        spare.close()
        memory.set_budget(given)


def _prompt_in_loop(subject: Subject, tokens: int) -> float:
    """Have a prompt computed between decode steps; return the time from the end of the last."""
    rig = subject.rig
    rig.steps.clear()
    rig.until(lambda: len(rig.steps) > 1)
    number = rig.submit(subject.names[0], tokens, 1)
    rig.until(lambda: rig.finished([number]))
    (period,) = _periods(subject, PREFILL_CHUNK)
    return period


def _periods(subject: Subject, kind: int, first: bool | None = None) -> list[float]:
    """Return the times from the iteration before to the end of each of the first model's.

    ``first``: only of those that begin a segment, or only of the others.
    """
    return [
        step.ended_s - before.ended_s
        for before, step in itertools.pairwise(subject.rig.steps)
        if (step.model, step.kind) == (0, kind) and first in (None, step.first)
    ]


@contextmanager
def _saving(subject: Subject) -> Iterator[None]:
    """Save a sequence of the second instance over and over, on the worker that saves."""
    rig = subject.rig
    pool, host_kv = rig.engine.models[1].pool, rig.engine.host_kv
    tokens = min(SAVED_TOKENS, host_kv.limit_bytes // pool.block_bytes * BLOCK_TOKENS // 2)
    stop, saving = threading.Event(), Task()

    def save() -> None:
        while not stop.is_set():
            host_kv.save(pool, FIRST_KEY)
            host_kv.free(FIRST_KEY)

    pool.resize(FIRST_KEY, tokens // BLOCK_TOKENS)
    rig.engine.workers[D2H].submit(save, saving)
    try:
        yield
    finally:
        stop.set()
        rig.engine.inbox.wait(lambda: saving.done is not None)
        pool.free(FIRST_KEY)
    if saving.done is not None and saving.done.error is not None:
        raise saving.done.error


@contextmanager
def _pool(subject: Subject) -> Iterator[KVPool]:
    """Yield the model's pool; what was put into it is taken out again."""
    pool = subject.model.pool
    try:
        yield pool
    finally:
        for key in range(FIRST_KEY, FIRST_KEY + SCATTERED):
            pool.free(key)
            subject.rig.engine.host_kv.free(key)


def _submit(subject: Subject, name: str, count: int, prompt: int) -> list[int]:
    """Submit requests that go on for long."""
    longest = subject.checkpoint.max_context
    prompt = min(prompt, longest // 4)
    output = min(OUTPUT, longest - prompt)
    return [subject.rig.submit(name, prompt, output) for _ in range(count)]


def _end(subject: Subject) -> None:
    """End all requests and put the models out."""
    rig = subject.rig
    transfers = list(rig.transfers)
    rig.clear()
    rig.transfers.extend(transfers)
    for name in subject.names:
        rig.level(name, OUT)


def _next_gap(subject: Subject, number: int) -> float:
    """Run until a request gets its next token; return the seconds since the one before."""
    times = subject.rig.times[number]
    count = len(times)
    subject.rig.until(lambda: len(times) > count)
    if times[-1][1].finish is not None:
        raise RuntimeError("the request ended before its steps were measured")
    return times[-1][0] - times[-2][0]


def _steps(subject: Subject, enough: Callable[[int], bool]) -> list[float]:
    """Run until there are enough decode steps of the first model; return their times."""
    subject.rig.steps.clear()
    subject.rig.until(lambda: enough(len(subject.rig.steps)) and bool(_decode_times(subject)))
    return _decode_times(subject)


def _steps_wanted(subject: Subject) -> int:
    """Return how many steps to see of each kind, all of which must fit into the requests."""
    longest = subject.checkpoint.max_context
    return min(BESIDE_STEPS if subject.deadline.left_s > 0 else LEAST_STEPS, longest // 10)


def _decode_times(subject: Subject) -> list[float]:
    """Return the times of the decode steps of the first model's whole batch."""
    return [
        step.took_s
        for step in subject.rig.steps
        if (step.model, step.kind, step.batch) == (0, DECODE_STEP, BESIDE_BATCH)
    ]


def _link_times(subject: Subject, kind: type) -> list[float]:
    """Return how long each piece was on the link for a load, or for a link-bound iteration."""
    return [
        (done.ended_ns - done.begun_ns) / 1e9
        for done in subject.rig.transfers
        if isinstance(done.tag, Transfer) and isinstance(done.tag.of, kind)
    ]


def _layers_at(subject: Subject, verb: int) -> int:
    """Return how many layers are held at a level."""
    return (subject.checkpoint.layers * (verb - LEVEL_0) + 3) // 4


def _share(verb: int) -> float:
    return (verb - LEVEL_0) / 4


def _highest(subject: Subject, batch: int, others: int = 0) -> int:
    """Return the highest level at which so many sequences fit, LEVEL_0 - 1 if none does."""
    state, weights = subject.rig.node.state, subject.model.weights
    blocks = batch * (2 + (2 * BESIDE_PROMPT) // BLOCK_TOKENS)
    room = int(state.budget_bytes - state.reserve_bytes) - others
    room -= blocks * subject.model.pool.block_bytes + subject.model.pool.slack_bytes
    for verb in LEVELS:
        layers = weights.piece_bytes[1:]
        if weights.piece_bytes[0] + max(layers) * _layers_at(subject, verb) <= room:
            return verb
    return LEVEL_0 - 1
