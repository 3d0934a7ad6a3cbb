"""Each iteration and transfer of a live run against its price in the simulator.

The price is that of the very batch, context or bytes that the live node had. An iteration is
compared by the time from its start to its end as the loop saw them, for that is what the simulator
charges; a link-bound one only where it had the link for itself and its model was not loading, for
then its time is its own.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from mmrl.deploy.node import LiveNode
from mmrl.deploy.validate.record import SAVE, Recording
from mmrl.deploy.validate.trail import Arrays
from mmrl.node.state import (
    DECODE_STEP,
    LINK_LOAD,
    LINK_RESTORE,
    LINK_STREAM,
    PREFILL_CHUNK,
)
from mmrl.profiles.costs import decode_ns, prefill_chunk_ns
from mmrl.sim.link import slow_share

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Steps = Arrays  # of one kind, see `priced_steps`
TRANSFER_NAMES = {
    LINK_LOAD: "load",
    LINK_STREAM: "stream",
    LINK_RESTORE: "restore",
    SAVE: "save",
}


def priced_steps(recording: Recording) -> dict[str, Steps]:
    """Return the iterations that can be compared, with what they took and their prices.

    Returns:
        For ``decode``, ``prefill`` and ``streamed``: ``model``, ``batch``, ``tokens`` (context of
        the batch, or of the chunk), ``took_s``, ``price_s``, and ``beside``: the bits 1 << kind of
        the transfers that ran at the same time.
    """
    steps, node = recording.columns("iteration"), recording.node()
    prices_ns = np.array([_price_ns(node, steps, i) for i in range(len(steps["model"]))], np.int64)
    prices_ns += _settled(steps) * np.asarray(node.state.settle_ns)[steps["model"]]
    beside = _beside(steps, recording.columns("transfer"))
    others = ~(1 << LINK_STREAM | 1 << SAVE)
    kinds: dict[str, Flags] = {
        "decode": (steps["kind"] == DECODE_STEP) & (steps["link_bound"] == 0),
        "prefill": (steps["kind"] == PREFILL_CHUNK) & (steps["link_bound"] == 0),
        "streamed": (steps["link_bound"] == 1) & (steps["waits"] == 0) & (beside & others == 0),
    }
    found = {}
    for name, chosen in kinds.items():
        took_ns = (steps["end_ns"] - steps["start_ns"])[chosen]
        found[name] = {
            "model": steps["model"][chosen],
            "batch": steps["batch"][chosen],
            "tokens": steps["context"][chosen] + steps["tokens"][chosen],
            "took_s": took_ns * 1e-9,
            "price_s": prices_ns[chosen] * 1e-9,
            "beside": beside[chosen],
        }
    return found


def step_errors(recording: Recording) -> dict[str, Any]:
    """Return errors of iterations by kind, overall, by model, and by what ran beside them."""
    found: dict[str, Any] = {}
    models = len(recording.models)
    for kind, steps in priced_steps(recording).items():
        moving = {"nothing": steps["beside"] == 0}
        moving |= {name: steps["beside"] & (1 << bit) != 0 for bit, name in TRANSFER_NAMES.items()}
        found[kind] = {
            "overall": _errors(steps, np.ones(len(steps["model"]), np.bool_)),
            "models": [_errors(steps, steps["model"] == m) for m in range(models)],
            "beside": {name: _errors(steps, chosen) for name, chosen in moving.items()},
        }
    return found


def transfer_errors(recording: Recording) -> dict[str, dict[str, Any]]:
    """Return errors of single transfers by kind: a piece, a layer, a sequence's KV cache."""
    transfers, node = recording.columns("transfer"), recording.node()
    price_s = np.array(
        [_transfer_ns(node, transfers, i) * 1e-9 for i in range(len(transfers["kind"]))]
    )
    kv = (transfers["kind"] == LINK_RESTORE) | (transfers["kind"] == SAVE)
    took_ns = np.where(
        kv,  # none of these is queued ahead: the loop's hand is in their price
        transfers["end_ns"] - transfers["start_ns"],
        transfers["ended_ns"] - transfers["begun_ns"],
    )
    table = {
        "took_s": took_ns * 1e-9,
        "price_s": price_s,
    }
    return {
        name: _errors(table, transfers["kind"] == kind) for kind, name in TRANSFER_NAMES.items()
    }


def gaps(recording: Recording) -> dict[str, Any]:
    """Return where time goes that no price knows of.

    Returns:
        ``between_steps``: median share of a decode step that passes before the next one begins;
        ``seen_s``: median time from the end of an iteration to the instant at which the loop
        sees it; ``beside``: of decode steps, by what moves meanwhile.
    """
    steps = recording.columns("iteration")
    chosen = np.flatnonzero((steps["kind"] == DECODE_STEP) & (steps["link_bound"] == 0))
    follow = chosen[1:][steps["start_ns"][chosen[1:]] == steps["end_ns"][chosen[:-1]]]
    before = chosen[:-1][steps["start_ns"][chosen[1:]] == steps["end_ns"][chosen[:-1]]]
    gap_ns = steps["begun_ns"][follow] - steps["ended_ns"][before]
    took_ns = np.maximum(1, steps["ended_ns"][before] - steps["begun_ns"][before])
    return {
        "between_steps": _median(gap_ns / took_ns),
        "seen_s": _median((steps["end_ns"] - steps["ended_ns"])[chosen] * 1e-9),
        "beside": step_errors(recording)["decode"]["beside"],
    }


def _settled(steps: Arrays) -> Flags:
    """Return which iterations are the first of a segment of a resident model, bool[n].

    A batch that has settled has another context than before, or another size.
    """
    found: Flags = np.zeros(len(steps["model"]), np.bool_)
    decodes, resident = steps["kind"] == DECODE_STEP, steps["link_bound"] == 0
    for m in np.unique(steps["model"]):
        mine = np.flatnonzero(decodes & (steps["model"] == m))
        settled = np.stack([steps["batch"][mine], steps["context"][mine]])
        found[mine] = np.diff(settled, axis=1, prepend=-1).any(axis=0)
    return np.asarray(found & resident, np.bool_)


def _price_ns(node: LiveNode, steps: Arrays, i: int) -> int:
    """Return what the simulator charges for an iteration, but for settling."""
    s, m = node.state, int(steps["model"][i])
    profile, context, tokens = int(s.profile[m]), int(steps["context"][i]), int(steps["tokens"][i])
    if steps["kind"][i] == DECODE_STEP:
        table, scale = node.decode_tables[profile], float(s.decode_scale[m])
        compute = step = decode_ns(table, scale, int(steps["batch"][i]), context)
    else:
        step = decode_ns(node.decode_tables[profile], float(s.decode_scale[m]), 1, 0)
        table, scale = node.prefill_tables[profile], float(s.prefill_scale[m])
        compute = prefill_chunk_ns(table, scale, context, tokens)
    if not steps["link_bound"][i]:
        beside = int(steps["beside"][i])
        moving = [bool(beside & 1 << kind) for kind in (LINK_LOAD, LINK_STREAM, SAVE)]
        return int(compute + slow_share(s, m, *moving) * step + 0.5)
    layers = int(steps["layers"][i])
    streaming = int(s.stream_fixed_ns[m] + layers * s.stream_layer_ns[m]) if layers else 0
    return max(compute, streaming)


def _transfer_ns(node: LiveNode, transfers: Arrays, i: int) -> int:
    """Return what the simulator charges for a transfer."""
    s, m = node.state, int(transfers["model"][i])
    kind, blocks = int(transfers["kind"][i]), transfers["bytes"][i] / int(s.block_bytes[m])
    if kind == LINK_STREAM:
        return int(s.stream_layer_ns[m] + transfers["fixed"][i] * s.stream_fixed_ns[m])
    if kind == LINK_LOAD:
        piece = s.load_base_ns[m] if transfers["base"][i] else s.load_layer_ns[m]
        return int(piece + transfers["fixed"][i] * s.load_fixed_ns[m])
    if kind == SAVE:
        return int(s.save_fixed_ns[m]) + int(blocks * float(s.save_block_ns[m]) + 0.5)
    return int(s.restore_fixed_ns[m]) + int(blocks * float(s.restore_block_ns[m]) + 0.5)


def _beside(steps: Arrays, transfers: Arrays) -> npt.NDArray[np.int64]:
    """Return the kinds of transfer that ran while each iteration did, as bits, int64[n]."""
    found = np.zeros(len(steps["model"]), np.int64)
    for kind in TRANSFER_NAMES:
        mine = transfers["kind"] == kind
        begun, ended = transfers["begun_ns"][mine], transfers["ended_ns"][mine]
        # transfers of a direction follow each other: the first that ends after the beginning
        first = np.searchsorted(ended, steps["begun_ns"], side="right")
        there = first < len(begun)
        overlaps = np.zeros(len(found), np.bool_)
        overlaps[there] = begun[first[there]] < steps["ended_ns"][there]
        found |= overlaps.astype(np.int64) << kind
    return found


def _errors(table: Arrays, chosen: Flags) -> dict[str, Any]:
    """Return count, median time and price, median absolute and median signed error of some."""
    took: Floats = table["took_s"][chosen]
    price: Floats = table["price_s"][chosen]
    errors = price / np.maximum(took, 1e-12) - 1
    return {
        "count": len(took),
        "live_s": _median(took),
        "price_s": _median(price),
        "error": _median(np.abs(errors)),
        "bias": _median(errors),
    }


def _median(values: npt.NDArray[Any]) -> float:
    return float(np.median(values)) if len(values) else float("nan")
