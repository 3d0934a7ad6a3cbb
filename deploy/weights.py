"""The weights of one model: one copy on the host, any part of them on the device.

The parameters of the module are views of one range of device addresses in which every *piece*
(the base weights, then each decoder layer) has its own place. Granting a piece puts memory behind
its place, loading it is one copy from the host, dropping it is giving the memory back: no parameter
is touched, nothing is copied back, and CUDA graphs captured once stay valid.

A model that holds only some layers runs all the same, see ``mmrl.deploy.streaming``: the others
come through slots for the time of an iteration. Outside of such an iteration every parameter points
at its own place.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from mmrl.deploy.memory import (
    DeviceMemory,
    HostArena,
    OutOfDeviceMemory,
    copy_async,
    wait_for_stream,
)
from mmrl.deploy.streaming import LinkBoundGate, StreamSlots
from mmrl.deploy.workers import Launched

if TYPE_CHECKING:
    from mmrl.deploy.decoder import Piece

HOST_ALIGNMENT = 4096  # bytes; each piece begins on a page of the host


def nested_order(layers: int) -> tuple[int, ...]:
    """Order the layers so that the first so many are spread evenly, however many they are.

    Every fourth layer comes first, then the ones half-way between, then the rest in two rounds:
    a quarter, a half and three quarters of the layers are spread perfectly. Within a round the
    next layer is the one farthest from those of its round that came before.

    Args:
        layers: Number of layers.

    Returns:
        All layers, each once.
    """
    order: list[int] = []
    for residue in (0, 2, 1, 3):
        chosen: list[int] = []
        left = list(range(residue, layers, 4))
        while left:
            best = max(left, key=lambda layer: (_distance(layer, chosen, layers), -layer))
            left.remove(best)
            chosen.append(best)
        order += chosen
    return tuple(order)


def choose_layers(held: set[int], count: int, layers: int) -> set[int]:
    """Choose which layers to hold: what is held is kept, and the others are spread evenly.

    Args:
        held: Layers that are worth keeping.
        count: How many to hold.
        layers: Number of layers of the model.

    Returns:
        To grow, held and the first in `nested_order` that are not held; to shrink, held without
        the last in that order.

    Raises:
        ValueError: There are not so many layers.
    """
    if not (0 <= count <= layers and held <= set(range(layers))):
        raise ValueError(
            f"cannot hold {count} of {layers} layers, or {sorted(held)} are not among them"
        )
    order = nested_order(layers)
    first_held = [layer for layer in order if layer in held]
    others = [layer for layer in order if layer not in held]
    return set((first_held + others)[:count])


def _distance(layer: int, chosen: list[int], layers: int) -> int:
    """Return how far a layer is from the nearest chosen one, on a ring of all layers."""
    return min((min(abs(layer - c), layers - abs(layer - c)) for c in chosen), default=layers)


def host_bytes(pieces: Sequence["Piece"]) -> int:
    """Return the size of the host arena that `host_buffers` cuts for pieces."""
    return sum(_round_up(piece.nbytes) for piece in pieces)


def host_buffers(arena: HostArena, pieces: Sequence["Piece"]) -> list[torch.Tensor]:
    """Cut an arena of `host_bytes` into one buffer for each piece.

    Returns:
        For each piece uint8 [nbytes of the piece], views of the arena.
    """
    buffers = []
    at = 0
    for piece in pieces:
        buffers.append(arena.tensor[at : at + piece.nbytes])
        at += _round_up(piece.nbytes)
    return buffers


def _round_up(nbytes: int) -> int:
    return -(-nbytes // HOST_ALIGNMENT) * HOST_ALIGNMENT


class ModelWeights:
    """All parameters of one model, and which of its pieces are on the device.

    One thread at a time grants; one thread at a time copies. Pieces are numbered as in the
    checkpoint: 0 is the base weights, 1 + i is layer i.

    Args:
        module: Built on meta; its parameters are replaced, its buffers moved to the device for
            life (they are small, and no piece holds them).
        pieces: Which parameters lie where in each piece.
        layers_path: Name of the module that holds the decoder layers in order of execution.
        host: For each piece uint8 [at least its bytes] with the weights; see `host_buffers`.
        memory: The device.
        slots: The node's streaming slots.

    Attributes:
        module: As given.
        layers: Number of layers.
        piece_bytes: For each piece what it takes of the device budget.
        granted: Layers with memory on the device, or None if not even the base weights have.
        landed: Pieces whose weights are on the device.

    Raises:
        ValueError: The pieces do not hold each parameter of the module once, in its shape.
    """

    def __init__(
        self,
        module: nn.Module,
        pieces: Sequence["Piece"],
        layers_path: str,
        host: Sequence[torch.Tensor],
        memory: DeviceMemory,
        slots: StreamSlots,
    ) -> None:
        self.module = module
        self.layers = len(pieces) - 1
        self.piece_bytes = tuple(memory.round_up(piece.nbytes) for piece in pieces)
        self.granted: frozenset[int] | None = None
        self.landed: frozenset[int] = frozenset()
        self._device = memory.device
        self._slots = slots
        self._gate: LinkBoundGate | None = None
        self._copying: set[int] = set()  # claimed, and not landed yet
        self._host = [buffer[: piece.nbytes] for buffer, piece in zip(host, pieces, strict=True)]
        self._layer_modules = list(module.get_submodule(layers_path).children())
        if len(self._layer_modules) != self.layers:
            raise ValueError(f"{len(self._layer_modules)} layers, but pieces for {self.layers}")
        self._starts = [sum(self.piece_bytes[:i]) for i in range(len(pieces))]
        self._range = memory.reserve(sum(self.piece_bytes))
        # Made once and outside of inference mode: pointing a parameter elsewhere is then one
        # assignment that is allowed everywhere.
        with torch.inference_mode(False):
            places = [self._range.tensor[start:] for start in self._starts]
            self._home = [_views(at, piece) for at, piece in zip(places, pieces, strict=True)]
            self._in_slot = [
                [_views(slot.tensor, piece) for piece in pieces[1:]]
                for slot in slots.slots
                if max(piece.nbytes for piece in pieces[1:]) <= slots.nbytes
            ]
            self._parameters = _replace_parameters(module, pieces, self._home)
            for submodule in module.modules():
                for name, buffer in submodule._buffers.items():
                    submodule._buffers[name] = None if buffer is None else buffer.to(self._device)

    @property
    def device_bytes(self) -> int:
        """Return what the granted pieces take of the device budget."""
        return self._range.committed_bytes

    def choose(self, count: int) -> set[int]:
        """Choose the layers to hold, or to go on with, if so many are to be held.

        To grow, all that are granted are kept. To shrink, those that have landed or are being
        copied go before those whose place is still empty: so the number of landed pieces is
        always the smaller of what had landed and what is held. The choice stays the same while
        its own layers land.

        Args:
            count: Number of layers.
        """
        held = set() if self.granted is None else set(self.granted)
        if count < len(held):
            held = {piece - 1 for piece in self.landed | self._copying if piece}
        return choose_layers(held, count, self.layers)

    def claim_piece(self, count: int) -> int | None:
        """Pick the piece to load next if so many layers are to be held; None if none is missing.

        From now on it counts as being copied: `start_piece` has to follow. The base weights come
        first, then the layers in order of execution: a model that computes while it loads finds
        them in the order in which it needs them.

        Args:
            count: Number of layers; memory for `choose` of it is granted.
        """
        pieces = [0, *(layer + 1 for layer in sorted(self.choose(count)))]
        with self._slots.condition:
            here = self.landed | self._copying
            piece = next((piece for piece in pieces if piece not in here), None)
            if piece is not None:
                self._copying.add(piece)
            return piece

    def set_granted(self, layers: Iterable[int] | None) -> None:
        """Take device memory for the base weights and these layers, and give all else back.

        Memory that is given back must not be in use: no iteration of the model computes, but for a
        link-bound one that streams the layers in question.

        Args:
            layers: The layers, or None for nothing at all, not even the base weights.

        Raises:
            OutOfDeviceMemory: There is not enough; what was given back stays given back, and
                nothing has been taken.
            RuntimeError: Something to be given back is being copied, or used by a link-bound
                iteration whose gate is not closed yet (that it has been cancelled is not enough).
            ValueError: The model has no such layers.
        """
        wanted = None if layers is None else frozenset(layers)
        if wanted is not None and not wanted <= frozenset(range(self.layers)):
            raise ValueError(f"layers {sorted(wanted)} of a model with {self.layers}")
        before = self._granted_pieces()
        after = frozenset() if wanted is None else frozenset({0, *(i + 1 for i in wanted)})
        dropped, added = before - after, after - before
        with self._slots.condition:
            if self._copying & dropped:
                raise RuntimeError(f"pieces {sorted(self._copying & dropped)} are being copied")
            if self._gate is not None and self._layers_of(dropped) - {*self._gate.streamed}:
                raise RuntimeError("layers are dropped that a link-bound iteration uses")
            if self._gate is not None and 0 in dropped:
                raise RuntimeError("base weights are dropped that a link-bound iteration uses")
            self.landed -= dropped
        for piece in sorted(dropped):
            self._range.decommit(*self._bounds(piece))
        kept = before - dropped
        self.granted = self._layers_of(kept) if 0 in kept else None
        taken = []
        try:
            for piece in sorted(added):
                self._range.commit(*self._bounds(piece), later=True)
                taken.append(piece)
        except BaseException:
            for piece in taken:
                self._range.decommit(*self._bounds(piece))
            raise
        self.granted = wanted

    def copy_piece(self, piece: int) -> None:
        """Copy a granted piece to its place on the current stream, and return when it has landed.

        Args:
            piece: 0 for the base weights, 1 + i for layer i.

        Raises:
            RuntimeError: The piece is not granted.
        """
        self.start_piece(piece).wait()

    def start_piece(self, piece: int) -> Launched:
        """Start to copy a granted piece to its place on the current stream.

        Args:
            piece: 0 for the base weights, 1 + i for layer i.

        Returns:
            What waits until it has landed; to be called. A link-bound iteration that waits for
            this layer then goes on.

        Raises:
            RuntimeError: The piece is not granted.
        """
        with self._slots.condition:
            if piece not in self._granted_pieces():
                raise RuntimeError(f"piece {piece} is loaded without memory granted for it")
            self._copying.add(piece)
        try:
            self._range.materialise(*self._bounds(piece))
            self._start_copy(piece, self._range.tensor[self._starts[piece] :])
            copied = None
            if self._device.type == "cuda":
                copied = torch.cuda.current_stream(self._device).record_event()
            self._prepare_next()  # while the copy runs
        except BaseException:
            with self._slots.condition:
                self._copying.discard(piece)
            raise
        return Launched(functools.partial(self._land, piece, copied))

    def _land(self, piece: int, copied: torch.cuda.Event | None) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            with self._slots.condition:
                self.landed |= {piece}
                self._slots.condition.notify_all()
        finally:
            with self._slots.condition:
                self._copying.discard(piece)

    def stream_layer(self, layer: int, gate: LinkBoundGate) -> bool:
        """Copy a layer to its slot on the current stream, and return when it is there.

        First waits until the layer that used the slot has been computed. A thread that also loads
        granted layers must not begin before `LinkBoundGate.slot_free`: the layer in the slot may
        itself wait for one of those.

        Args:
            layer: The first of the layers that the gate streams which has not been streamed yet.
            gate: Of the link-bound iteration.

        Returns:
            Whether it was copied; not if the iteration has been cancelled or is over, or if it
            pulls its layers itself. A copy that has begun ends, even if it is then lost.
        """
        return not gate.pull and self._fill_slot(layer, gate)

    def link_bound(
        self,
        streamed: Sequence[int],
        *,
        pull: bool = False,
        freed: Callable[[], None] | None = None,
    ) -> LinkBoundGate:
        """Open the gate of a link-bound iteration; see `LinkBoundGate`.

        It is the one that `LinkBoundGate.following` has opened already where that streams the same
        layers of this model; any other that has been opened early is closed.

        Args:
            streamed: The layers to stream, in order of execution: those that are not granted, and
                any others that no load brings (see `choose`). All others have landed, or will.
            pull: The iteration does not wait: it copies each missing layer itself.
            freed: Called when a slot has become free, by the thread that computes.

        Raises:
            ValueError: A layer that is not granted is missing, the order is another, or a layer
                fits no slot.
            RuntimeError: The base weights have not landed, or the last gate is not closed.
        """
        streamed = tuple(streamed)
        if 0 not in self.landed or self.granted is None:
            raise RuntimeError("an iteration without the base weights on the device")
        needed = set(range(self.layers)) - self.granted
        if not needed <= set(streamed) or streamed != tuple(sorted(set(streamed))):
            raise ValueError(f"layers {sorted(needed)} have to be streamed, not {list(streamed)}")
        if streamed and not self._in_slot:
            raise ValueError(f"a layer does not fit a streaming slot of {self._slots.nbytes} bytes")
        with self._slots.condition:
            if self._gate is not None:
                raise RuntimeError("a link-bound iteration of this model is still open")
            early, self._slots.early = self._slots.early, None
        if early is not None and not early.serves(self, streamed):
            early.close()
            early = None
        self._gate = early or LinkBoundGate(self, self._slots, streamed, pull, freed)
        return self._gate

    @property
    def early_gate(self) -> LinkBoundGate | None:
        """The gate that `LinkBoundGate.following` has opened for this model's next iteration."""
        early = self._slots.early
        return early if early is not None and early.serves(self, early.streamed) else None

    def close(self) -> None:
        """Give all device memory back, with the addresses; the module cannot be used any more."""
        self._range.close()
        self.granted = None
        self.landed = frozenset()

    def _fill_slot(self, layer: int, gate: LinkBoundGate) -> bool:
        condition = self._slots.condition
        with condition:
            if gate.over():
                return False
            number = gate._begun
            if number == len(gate.streamed) or gate.streamed[number] != layer:
                raise ValueError(f"layer {layer} is not the next of {list(gate.streamed)}")
            place = gate.slot_of(number)
            slot = self._slots.slots[place]
            condition.wait_for(lambda: slot.user is None or gate.over())
            if gate.over():
                return False
            gate._begun += 1
            slot.user, slot.copying = gate, True
        arrived = False
        try:
            if slot.computed is not None:
                torch.cuda.current_stream(self._device).wait_event(slot.computed)
            self._copy(layer + 1, slot.tensor)
            arrived = True
        finally:
            with condition:
                slot.copying = False
                if arrived and not gate.closed:
                    gate._in_slot[layer] = place
                else:
                    slot.user = None
                condition.notify_all()
        return True

    def _pull(self, layer: int, gate: LinkBoundGate) -> None:
        """Copy a missing layer to where the iteration expects it, on the thread that computes."""
        if layer in gate.streamed:
            self._fill_slot(layer, gate)
        else:
            self._range.materialise(*self._bounds(layer + 1))
            self._copy(layer + 1, self._range.tensor[self._starts[layer + 1] :])

    def _copy(self, piece: int, place: torch.Tensor) -> None:
        self._start_copy(piece, place)
        wait_for_stream(self._device)

    def _start_copy(self, piece: int, place: torch.Tensor) -> None:
        source = self._host[piece]
        copy_async(place[: source.numel()], source)

    def _prepare_next(self) -> None:
        """Put memory behind the piece that is probably loaded next."""
        with self._slots.condition:
            here = self.landed | self._copying
            pieces = sorted(self._granted_pieces() - here)
        if pieces:
            # Given back in the meantime; or the piece itself will say that there is no memory.
            with contextlib.suppress(ValueError, OutOfDeviceMemory):
                self._range.materialise(*self._bounds(pieces[0]))

    def _granted_pieces(self) -> frozenset[int]:
        if self.granted is None:
            return frozenset()
        return frozenset({0, *(layer + 1 for layer in self.granted)})

    @staticmethod
    def _layers_of(pieces: Iterable[int]) -> frozenset[int]:
        return frozenset(piece - 1 for piece in pieces if piece)

    def _bounds(self, piece: int) -> tuple[int, int]:
        return self._starts[piece], self._starts[piece] + self.piece_bytes[piece]

    def _point(self, layer: int, slot: int | None) -> None:
        """Point the parameters of a layer at a slot, or at their own place."""
        views = self._home[layer + 1] if slot is None else self._in_slot[slot][layer]
        for parameter, view in zip(self._parameters[layer + 1], views, strict=True):
            parameter.data = view


def _views(place: torch.Tensor, piece: "Piece") -> list[torch.Tensor]:
    """Cut the tensors of a piece out of the bytes that begin at place."""
    return [
        place[spec.offset : spec.offset + spec.nbytes].view(spec.dtype).view(spec.shape)
        for spec in piece.tensors
    ]


def _replace_parameters(
    module: nn.Module, pieces: Sequence["Piece"], views: Sequence[Sequence[torch.Tensor]]
) -> list[list[nn.Parameter]]:
    """Put parameters over views in the place of the module's; tied ones stay tied.

    Returns:
        The new parameters, piece by piece, in the order of its tensors.
    """
    named = dict(module.named_parameters(remove_duplicate=False))
    users: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for submodule in module.modules():
        for attribute, parameter in submodule._parameters.items():
            if parameter is not None:
                users.setdefault(parameter, []).append((submodule, attribute))
    result = []
    for piece, its_views in zip(pieces, views, strict=True):
        made = []
        for spec, view in zip(piece.tensors, its_views, strict=True):
            old = named.get(spec.name)
            if old is None or old not in users:
                raise ValueError(f"{spec.name} is no parameter of the module, or is there twice")
            if old.shape != view.shape:
                raise ValueError(f"{spec.name} is {[*view.shape]}, not {[*old.shape]}")
            new = nn.Parameter(view, requires_grad=False)
            for submodule, attribute in users.pop(old):
                submodule._parameters[attribute] = new
            made.append(new)
        result.append(made)
    if users:
        absent = [name for name, parameter in named.items() if parameter in users]
        raise ValueError(f"no piece holds {', '.join(absent)}")
    return result
