"""`Recording`: what is kept of one run of the live node, in one small file.

`RecordedNode` is the live node's state that writes down each iteration, transfer and decision as it
happens. The file has all that playing the run through the simulator needs: arrivals, decisions, the
numbers of the node and the profiles of its models.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from mmrl.deploy.node import LiveNode, ModelCosts, NodeNumbers
from mmrl.deploy.validate.trail import Arrays, Fields, Trail
from mmrl.errors import InputError
from mmrl.files import atomic_write
from mmrl.node.state import (
    DECODE_STEP,
    DISPATCHES,
    IDLE,
    LINK_IDLE,
    LINK_LOAD,
    LINK_RESTORE,
    LINK_STREAM,
    NODE,
    REQUEST,
    Nodes,
    Record,
    new_nodes,
    new_requests,
)
from mmrl.profiles.schema import Profile
from mmrl.scenarios.targets import TargetNumbers

FORMAT = 2
SAVE = 4  # a transfer device to host, beside LINK_RESTORE, LINK_STREAM and LINK_LOAD
ITERATIONS = (
    "model",
    "kind",  # PREFILL_CHUNK or DECODE_STEP
    "link_bound",
    "batch",
    "context",  # KV tokens of the batch at its settling; of a chunk, the tokens before it
    "tokens",  # of a chunk
    "layers",  # to be streamed
    "waits",  # for the load of its model
    "beside",  # what the link had to do at its start: bits 1 << LINK_LOAD, LINK_STREAM, SAVE
    "start_ns",  # as the state has it
    "end_ns",
    "begun_ns",  # as the worker has it
    "ended_ns",
)
TRANSFERS = (
    "kind",
    "model",
    "bytes",
    "base",  # a load of the base weights, not of a layer
    "fixed",  # of a load or stream: with the fixed part
    "start_ns",
    "end_ns",
    "begun_ns",
    "ended_ns",
)
DECISIONS = ("asked_ns", "time_ns", "action", "applied")
# Of the node at the end: what metrics are made of.
_NODE_FIELDS: tuple[str, ...] = NODE.names or ()
_COUNTERS = _NODE_FIELDS[_NODE_FIELDS.index("decisions") :]
KEPT = ("n_models", "n_requests", "now_ns", "seg_steps", "decoding", *_COUNTERS)
REQUEST_FIELDS: tuple[str, ...] = REQUEST.names or ()


class RecordedNode(LiveNode):
    """A live node that writes down what happens to it.

    Attributes:
        trail: Residency and loads.
        zero_ns: What `time.monotonic_ns` was at instant 0 of the engine's clock.
    """

    def __init__(
        self,
        nodes: Nodes,
        table: Nodes,
        decode_tables: npt.NDArray[np.float64],
        prefill_tables: npt.NDArray[np.float64],
        models: Sequence[ModelCosts] = (),
    ) -> None:
        super().__init__(nodes, table, decode_tables, prefill_tables, models)
        self.trail = Trail(self.nodes)
        self.zero_ns = 0
        self.failures = 0
        self._iterations: list[list[int]] = []
        self._transfers: list[list[int]] = []
        self._decisions: list[tuple[int, ...]] = []
        self._computing: list[int] = []
        self._link_bound: list[int] = []
        self._worked: tuple[int, int] | None = None
        self._asked_ns = 0
        self._fixed = 0
        self._fields = Fields(self.nodes)

    def watch(self, what: str, value: Any) -> None:
        """Hear from the engine when a worker began and ended."""
        if what == "iteration":  # said before the state hears of its end
            self._worked = value[1].begun_ns - self.zero_ns, value[1].ended_ns - self.zero_ns
        elif what in ("h2d", "d2h"):  # said after
            saves = what == "d2h"
            last = next(t for t in reversed(self._transfers) if (t[0] == SAVE) == saves)
            last[-2:] = value.begun_ns - self.zero_ns, value.ended_ns - self.zero_ns

    # ------------------------------------------------------------------ what happens

    def advance(self, now_ns: int, *, h2d: bool = False, d2h: bool = False) -> None:
        """Come to an instant and end its transfers."""
        f = self._fields
        if h2d:
            kind, m = int(f.h2d_kind[0]), int(f.h2d_model[0])
            base = bool(kind == LINK_LOAD and f.landed[m] == 0)
            moved = int(f.base_bytes[m] if base else f.layer_bytes[m])
            if kind == LINK_RESTORE:
                moved = int(self.requests["blocks"][f.h2d_request[0]] * f.block_bytes[m])
            self._moved(kind, m, moved, base, self._fixed, int(f.h2d_start_ns[0]), now_ns)
        if d2h:
            i = int(f.d2h_request[0])
            m = int(self.requests["model"][i])
            moved = int(self.requests["blocks"][i] * f.block_bytes[m])
            self._moved(SAVE, m, moved, 0, 0, int(f.d2h_start_ns[0]), now_ns)
        super().advance(now_ns, h2d=h2d, d2h=d2h)

    def start_work(self) -> None:
        """Start in the arrays what can start."""
        f = self._fields
        idle, free = f.gpu_kind[0] == IDLE, f.h2d_kind[0] == LINK_IDLE
        begun, paid = f.load_begun.tobytes(), bool(f.lb_fixed_paid[0])
        super().start_work()
        if idle and f.gpu_kind[0] != IDLE:
            self._started()
            paid = paid and not f.gpu_link_bound[0]
        if free:
            first = f.h2d_kind[0] == LINK_LOAD and not begun[f.h2d_model[0]]
            self._fixed = int(first or (f.h2d_kind[0] == LINK_STREAM and not paid))

    def end_compute(self) -> None:
        """End the iteration that computes."""
        link_bound = bool(self._fields.gpu_link_bound[0])
        super().end_compute()
        if not link_bound:
            self._ended(self._computing, self._worked)
            self._worked = None

    def end_link_bound(self) -> None:
        """End the link-bound iteration in flight."""
        complete = self.link_bound_complete
        super().end_link_bound()
        if complete:
            self._ended(self._link_bound, None)

    def fail_iteration(self, m: int, *, link_bound: bool, out: bool) -> None:
        """End an iteration with nothing produced."""
        self.failures += 1
        super().fail_iteration(m, link_bound=link_bound, out=out)

    def settle(self) -> bool:
        """Take in arrivals and settle memory."""
        due = super().settle()
        self.trail.look()
        return due

    def begin_decision(self) -> bool:
        """Begin a decision instant."""
        self._asked_ns = int(self._fields.now_ns[0])
        return super().begin_decision()

    def act(self, action: int) -> bool:
        """Do a decision."""
        done = int(self._fields.actions.sum())
        self.trail.note(action)
        more = super().act(action)
        applied = int(self._fields.actions.sum()) - done
        self._decisions.append((self._asked_ns, int(self._fields.now_ns[0]), action, applied))
        return more

    # ------------------------------------------------------------------ what is kept

    def arrays(self) -> Arrays:
        """Return all that was written down, and the node and its requests as they are now."""
        s = self.state
        found = {f"request_{name}": self.requests[name][: s.n_requests] for name in REQUEST_FIELDS}
        found |= {f"node_{name}": np.asarray(s[name]) for name in KEPT}
        for prefix, names, rows in (
            ("iteration", ITERATIONS, self._iterations),
            ("transfer", TRANSFERS, self._transfers),
            ("decision", DECISIONS, self._decisions),
        ):
            table = np.array(rows, np.int64).reshape(-1, len(names))
            found |= {f"{prefix}_{name}": table[:, i] for i, name in enumerate(names)}
        return {name: array.copy() for name, array in (found | self.trail.arrays()).items()}

    def _moved(self, *transfer: int) -> None:
        self._transfers.append([*transfer, *transfer[-2:]])

    def _started(self) -> None:
        f = self._fields
        m, kind, link_bound = int(f.gpu_model[0]), int(f.gpu_kind[0]), bool(f.gpu_link_bound[0])
        batch, context = int(f.decoding[m]), int(f.context_tokens[m])
        if kind != DECODE_STEP:
            batch, context = 1, int(self.requests["prefilled"][f.prefilling[m]])
        layers = int(f.lb_layers[0]) if link_bound else 0
        waits = link_bound and bool(f.landed[m] < f.lb_need[0])
        beside = int(f.load_len[0] > 0) << LINK_LOAD
        beside |= int(f.lb_kind[0] != IDLE and f.lb_layers[0] > 0) << LINK_STREAM
        beside |= int(f.save_len[0] > 0 or f.d2h_request[0] >= 0) << SAVE
        tokens, now = int(f.gpu_tokens[0]), int(f.now_ns[0])
        row = [m, kind, int(link_bound), batch, context, tokens, layers, int(waits), beside, now]
        if link_bound:
            self._link_bound = row
        else:
            self._computing = row

    def _ended(self, row: list[int], worked: tuple[int, int] | None) -> None:
        start_ns, now = row[-1], int(self._fields.now_ns[0])
        self._iterations.append([*row, now, *(worked or (start_ns, now))])


@dataclass(frozen=True)
class Recording:
    """A run of the live node.

    Attributes:
        header: What ran: see `header_of`.
        arrays: Of `RecordedNode.arrays`.
    """

    header: dict[str, Any]
    arrays: Arrays

    @property
    def name(self) -> str:
        """Policy and load, as in the name of its file."""
        return f"{self.header['policy']['name']}-{self.header['load']:g}"

    @property
    def models(self) -> list[str]:
        """Names of the models."""
        return [model["name"] for model in self.header["models"]]

    def node(self, **changes: Any) -> LiveNode:
        """Return a node with the numbers and costs of the live one, with nothing in it.

        Args:
            **changes: Numbers of it that shall be others, see `NodeNumbers`.
        """
        costs = [
            ModelCosts(
                Profile.model_validate(model["profile"]),
                model["layers"],
                model["base_bytes"],
                model["layer_bytes"],
                model["block_bytes"],
                TargetNumbers(*model["targets"]),
                model["batch"],
            )
            for model in self.header["models"]
        ]
        return LiveNode.of(costs, replace(NodeNumbers(**self.header["numbers"]), **changes))

    def end(self) -> tuple[Record, Nodes]:
        """Return the live node as it was at the end: a record of NODE and recarray[R]."""
        s, r = new_nodes(1)[0], new_requests(1, len(self.arrays["request_model"]))[0]
        for name in KEPT:
            s[name] = self.arrays[f"node_{name}"]
        for name in REQUEST_FIELDS:
            r[name] = self.arrays[f"request_{name}"]
        return s, r

    def columns(self, table: str) -> Arrays:
        """Return the columns of ``iteration``, ``transfer`` or ``decision``, int64[n] each."""
        return {
            name.removeprefix(f"{table}_"): array
            for name, array in self.arrays.items()
            if name.startswith(f"{table}_")
        }

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            InputError: Nothing can be written there.
        """
        header = np.frombuffer(json.dumps(self.header, allow_nan=False).encode(), np.uint8)
        arrays: dict[str, Any] = {"header": header} | self.arrays
        for name in self.arrays:
            if name.endswith("_ns") and self.arrays[name].ndim == 1:
                arrays[name] = np.diff(self.arrays[name], prepend=0)  # compresses much better
        with atomic_write(path, "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def read(cls, path: Path) -> "Recording":
        """Read a file.

        Raises:
            InputError: It is missing, damaged or of another version.
        """
        remedy = "measure again: mmrl validate run"
        try:
            with path.open("rb") as data, np.load(data, allow_pickle=False) as file:
                arrays: Arrays = {name: file[name] for name in file.files}
            header = json.loads(arrays.pop("header").tobytes())
            version = header["format"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
            raise InputError(f"{path}: cannot read the recording: {error}", remedy) from error
        if version != FORMAT:
            raise InputError(f"{path}: format {version}, this version reads {FORMAT}", remedy)
        for name in arrays:
            if name.endswith("_ns") and arrays[name].ndim == 1:
                arrays[name] = np.cumsum(arrays[name])
        return cls(header, arrays)


def numbers_of(s: Record) -> NodeNumbers:
    """Return the numbers that a node's state was filled with."""
    values = {field: s[field].item() for field in NodeNumbers.__dataclass_fields__}
    values["dispatch"] = DISPATCHES[values["dispatch"]]
    values |= {"full_verbs": bool(values["full_verbs"]), "prefetch": bool(values["prefetch"])}
    return NodeNumbers(**values)


def header_of(node: LiveNode, names: Sequence[str], **more: Any) -> dict[str, Any]:
    """Return what a file says of a node: its numbers, and each model with its costs.

    Args:
        node: The node.
        names: Its models.
        **more: Policy, load, workload and where all this comes from.
    """
    models = []
    for name, model in zip(names, node.models, strict=True):
        fields = {field: getattr(model, field) for field in ModelCosts.__dataclass_fields__}
        fields["profile"] = model.profile.model_dump(mode="json")
        models.append({"name": name} | fields)
    return {"format": FORMAT, "numbers": asdict(numbers_of(node.state)), "models": models} | more
