"""Layers that come and go: how a model runs of which only some layers are on the device.

While such a *link-bound* iteration is in flight (`LinkBoundGate`), a hook of accelerate on each
missing layer makes the forward pass wait until the layer has come: to its own place if a load
brings it, else into one of two streaming slots that all models of the node share (`StreamSlots`),
at which its parameters point for that long. A slot is filled again as soon as the layer in it has
been computed: at the end of an iteration with the first layers of the next one, where that streams
the same (`LinkBoundGate.following`), so that the link does not stand still while a step ends and
another begins. Outside of a link-bound iteration no hook is attached.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from mmrl.deploy.memory import DeviceMemory, VirtualRange

if TYPE_CHECKING:
    from mmrl.deploy.weights import ModelWeights


class Abandoned(Exception):
    """The link-bound iteration has been cancelled: it yields nothing, its layers do not come."""


class StreamSlots:
    """Two places on the device for layers that come and go, shared by all models of a node.

    Args:
        memory: Where; the memory is committed for life.
        nbytes: Bytes of the largest layer of the fleet; 0 where no layer is ever streamed.

    Attributes:
        nbytes: As given.
        device_bytes: What the two take of the budget.
        early: The gate of an iteration that has not begun, but whose layers come already.
        condition: Guards the slots and every gate on them; who waits for a layer or for a slot
            waits on it.

    Raises:
        OutOfDeviceMemory: There is no room for them.
    """

    def __init__(self, memory: DeviceMemory, nbytes: int) -> None:
        self.nbytes = nbytes
        self.condition = threading.Condition()
        self.slots: tuple[_Slot, ...] = ()
        self.device_bytes = 2 * memory.round_up(nbytes)
        self.early: LinkBoundGate | None = None
        self._turn = 0
        self._range: VirtualRange | None = None
        if nbytes:
            self._range = memory.reserve(self.device_bytes)
            self._range.commit(0, self.device_bytes)
            self.slots = tuple(_Slot(part) for part in self._range.tensor.chunk(2))

    def take_turns(self, count: int) -> int:
        """Return the slot of the first of so many layers; the slots go on in turn from there."""
        first = self._turn
        self._turn = (first + count) % 2
        return first

    def close(self) -> None:
        """Give the memory back; no model that was built on these slots may run any more."""
        self.slots = ()
        if self._range is not None:
            self._range.close()


class _Slot:
    """One streaming slot. Everything but tensor is guarded by the condition of the slots."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.user: LinkBoundGate | None = None  # its layer is in here, and not yet computed
        self.copying = False
        self.stream: torch.cuda.Stream | None = None  # on which the layer in here is computed
        self.computed: torch.cuda.Event | None = None  # when the device is done with the last one

    def release(self) -> None:
        """Let the next layer in, after what has been launched on the layer that is in here."""
        if self.stream is not None:
            self.computed = self.stream.record_event()
            self.stream = None
        self.user = None


class LinkBoundGate(AbstractContextManager["LinkBoundGate"]):
    """The gate of one link-bound iteration: it computes each layer as soon as it has come.

    Used by three threads. The scheduler makes it (`ModelWeights.link_bound`) and may cancel it;
    the thread that computes runs the forward pass inside ``with gate:``; the thread that copies
    calls `ModelWeights.stream_layer` for each streamed layer and `ModelWeights.start_piece` for
    granted ones. From its making on the slots can be filled; the gate must then be entered, or
    closed.

    Attributes:
        streamed: Layers to stream, in order of execution; they go into the slots in turn.
        claimed: How many of them `stream_next` has claimed.
        pull: Whether the iteration copies the missing layers itself, in place of waiting for them.
        cancelled: Whether it has been cancelled.
        closed: Whether it has been left, or closed.
    """

    def __init__(
        self,
        weights: "ModelWeights",
        slots: StreamSlots,
        streamed: tuple[int, ...],
        pull: bool,
        freed: Callable[[], None] | None,
    ) -> None:
        self.streamed = streamed
        self.pull = pull
        self.claimed = 0
        self.cancelled = False
        self.closed = False
        self._first = slots.take_turns(len(streamed))
        self._begun = 0  # of the streamed layers
        self._in_slot: dict[int, int] = {}  # streamed layers that have come -> slot
        self._weights = weights
        self._slots = slots
        self._freed = freed
        self._hooked: list[int] = []
        self._moved: list[int] = []  # layers whose parameters point at a slot

    def over(self) -> bool:
        """Return whether no further layer can be of use to it."""
        return self.cancelled or self.closed

    def __enter__(self) -> "LinkBoundGate":
        """Attach the hooks.

        Raises:
            Abandoned: It has been cancelled already; it is closed then.
        """
        if self.cancelled:
            self.close()
            raise Abandoned
        landed, layers = self._weights.landed, range(self._weights.layers)
        self._hooked = [i for i in layers if i in self.streamed or i + 1 not in landed]
        for layer in self._hooked:
            add_hook_to_module(self._weights._layer_modules[layer], _LayerHook(self, layer))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for layer in self._hooked:
            remove_hook_from_module(self._weights._layer_modules[layer])
        self.close()

    def slot_of(self, number: int) -> int:
        """Return the slot of the streamed layer of this number."""
        return (self._first + number) % 2

    def slot_free(self, number: int) -> bool:
        """Return whether the copy of the streamed layer of this number could start at once."""
        with self._slots.condition:
            return self._slots.slots[self.slot_of(number)].user is None

    @property
    def next_can_come(self) -> bool:
        """Whether there is a layer left to claim whose copy could start at once."""
        return self.claimed < len(self.streamed) and self.slot_free(self.claimed)

    def stream_next(self) -> Callable[[], bool]:
        """Claim the next layer; return the job that streams it, which has to be done."""
        layer = self.streamed[self.claimed]
        self.claimed += 1
        return functools.partial(self._weights.stream_layer, layer, self)

    def following(self) -> "LinkBoundGate":
        """Open the gate of the iteration after this one, if it streams the same layers.

        They may come from now on, each as soon as its slot is free. `ModelWeights.link_bound`
        then returns this gate; where it comes otherwise, closes it, and nothing is lost but the
        bytes.
        """
        early = self._slots.early
        if early is None or not early.serves(self._weights, self.streamed):
            if early is not None:
                early.close()
            early = LinkBoundGate(self._weights, self._slots, self.streamed, self.pull, self._freed)
            self._slots.early = early
        return early

    def serves(self, weights: "ModelWeights", streamed: Sequence[int]) -> bool:
        """Return whether an iteration of a model that streams these layers can use it."""
        return self._weights is weights and self.streamed == streamed and not self.over()

    def cancel(self) -> None:
        """Abandon the iteration: the forward pass raises `Abandoned` at its next missing layer.

        The thread that computes still has to leave the gate.
        """
        with self._slots.condition:
            self.cancelled = True
            self._slots.condition.notify_all()

    def close(self) -> None:
        """Leave the slots and the module as they were; leaving the ``with`` block does it.

        To be called by itself only for a gate that will never be entered. Does nothing twice.
        """
        if self.closed:
            return
        for layer in self._moved:
            self._weights._point(layer, None)
        with self._slots.condition:
            self.closed = True
            if self._weights._gate is self:
                self._weights._gate = None
            if self._slots.early is self:
                self._slots.early = None
            for slot in self._slots.slots:
                if slot.user is self and not slot.copying:
                    slot.release()
            self._slots.condition.notify_all()

    def _before(self, layer: int) -> None:
        """Return when a layer can be computed; its parameters then point at its weights.

        Raises:
            Abandoned: The iteration has been cancelled.
        """
        streams = layer in self.streamed
        if self.pull:
            self._weights._pull(layer, self)
        with self._slots.condition:
            if not self.pull:
                self._slots.condition.wait_for(
                    lambda: self.cancelled or self._has_come(layer, streams)
                )
            if self.cancelled:
                raise Abandoned
        if streams:
            number = self._in_slot[layer]
            slot = self._slots.slots[number]
            if slot.tensor.is_cuda:
                slot.stream = torch.cuda.current_stream(slot.tensor.device)
            self._weights._point(layer, number)
            self._moved.append(layer)

    def _after(self, layer: int) -> None:
        """Free the slot of a layer whose computation has been launched."""
        number = self._in_slot.get(layer)
        if number is None:
            return
        with self._slots.condition:
            self._slots.slots[number].release()
            self._slots.condition.notify_all()
        if self._freed is not None:
            self._freed()

    def _has_come(self, layer: int, streams: bool) -> bool:
        return layer in self._in_slot if streams else layer + 1 in self._weights.landed


class _LayerHook(ModelHook):  # type: ignore[misc]  # accelerate has no types
    """Holds the forward pass of one decoder layer until its weights have come."""

    def __init__(self, gate: LinkBoundGate, layer: int) -> None:
        self._gate = gate
        self._layer = layer

    def pre_forward(
        self, module: nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._gate._before(self._layer)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self._gate._after(self._layer)
        return output
