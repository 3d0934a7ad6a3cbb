"""`Transfers`: the link does what the state says, and what it will surely say next.

Host to device go the pieces of loads, the layers of the link-bound iteration and restored KV;
device to host saved KV. The state knows of one transfer at a time each way. While it is under way
the next one host to device is queued behind it; and once the last layer of a link-bound iteration
is on its way, the first layers of the model's next one follow, into the slots that are free: the
link does not stand still while the rest of the step computes and the next one begins. Nothing that
the state wants waits for more than one transfer that came ahead.
"""

import functools
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

from mmrl.deploy.kv import HostKV
from mmrl.deploy.node import LiveNode
from mmrl.deploy.served import Rows, Sequence_, ServedModel
from mmrl.deploy.streaming import LinkBoundGate
from mmrl.deploy.workers import Inbox, Lane, Task, Worker
from mmrl.node.state import (
    IDLE,
    LINK_IDLE,
    LINK_LOAD,
    LINK_RESTORE,
    LINK_STREAM,
    RESTORING,
    SAVED,
    SAVING,
)

Subject = ServedModel | LinkBoundGate | Sequence_ | None


@dataclass(eq=False)
class Transfer(Task):
    """A transfer that a worker has been given.

    Attributes:
        of: What it is for: the model that loads, the gate of the link-bound iteration, or the
            sequence that is saved or restored; None for a layer of an iteration that is gone.
    """

    of: Subject


class Transfers:
    """Both directions of the link.

    Args:
        models: The fleet.
        node: The state.
        rows: The requests in it.
        host_kv: Saved KV.
        h2d: Who copies to the device.
        d2h: Who copies to the host.
        inbox: Where they leave their messages.
        ahead: Whether anything is queued before the state asks for it.

    Attributes:
        gate: Of the link-bound iteration in flight.
        prefetched: Layers that went over the link before the iteration that was to stream them.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        node: LiveNode,
        rows: Rows,
        host_kv: HostKV,
        h2d: Worker,
        d2h: Worker,
        inbox: Inbox,
        ahead: bool,
    ) -> None:
        self._models, self._node, self._rows, self._host_kv = models, node, rows, host_kv
        self.h2d: Lane[Transfer] = Lane(h2d)
        self.d2h: Lane[Transfer] = Lane(d2h)
        self._inbox, self._ahead = inbox, ahead
        self.gate: LinkBoundGate | None = None
        self.prefetched = 0
        self._on_host: set[Sequence_] = set()  # whose KV is saved, or being saved

    @property
    def moving(self) -> set[Subject]:
        """What goes over the link now, or is queued to."""
        lanes = (self.h2d, self.d2h)
        return {
            task.of for lane in lanes for task in (lane.current, *lane.ahead) if task is not None
        }

    def start(self, unsettled: Container[int], ungranted: Sequence[int]) -> None:
        """Start what the state has put on the link, and queue what comes next.

        Args:
            unsettled: Rows whose KV blocks are still to be resized: they are moved after that.
            ungranted: Models whose granted weights have no memory yet: they are loaded after that.
        """
        s = self._node.state
        kind = int(s.h2d_kind)
        begins = s.h2d_request == s.lb_id and s.lb_kind != IDLE and not s.lb_abandoned
        waits = (
            (kind == LINK_RESTORE and int(s.h2d_request) in unsettled)
            or (kind == LINK_LOAD and int(s.h2d_model) in ungranted)
            or (kind == LINK_STREAM and begins and self.gate is None and self._ahead)
        )
        if kind != LINK_IDLE and self.h2d.current is None and not waits:
            of = self._subject(kind)
            ahead = next((one for one in self.h2d.ahead if one.of is of), None)
            if ahead is not None:
                self.h2d.adopt(ahead)
            else:
                self.h2d.start(self._job(of), Transfer(of))
        if self._ahead and not ungranted:
            self._look_ahead()
        if s.d2h_request >= 0 and self.d2h.current is None and int(s.d2h_request) not in unsettled:
            saved = self._rows[int(s.d2h_request)]
            if saved in self._on_host:  # restored and preempted again within one instant
                self._host_kv.free(saved.number)
            self._on_host.add(saved)
            pool = self._models[saved.model].pool
            job = functools.partial(self._host_kv.save, pool, saved.number)
            self.d2h.start(job, Transfer(saved))

    def hold_stream(self) -> None:
        """Let the state put no layer on the link whose slot is not free."""
        if not self._ahead:
            return
        gate = self.gate
        comes = gate is None or gate.next_can_come
        self._node.state.stream_hold = not (comes or any(one.of is gate for one in self.h2d.ahead))

    def forget(self, model: ServedModel) -> None:
        """Wait for the pieces of a model that have come ahead, and forget them."""
        pieces = [one for one in self.h2d.ahead if one.of is model]
        self._inbox.wait(lambda: all(piece.done is not None for piece in pieces))
        self.h2d.drop(lambda one: one.of is model)

    def free_saved(self) -> None:
        """Free the saved KV that nobody will restore."""
        for sequence in list(self._on_host):
            if self._node.requests[sequence.row]["state"] not in (SAVING, SAVED, RESTORING):
                self._on_host.remove(sequence)
                self._host_kv.free(sequence.number)

    def _subject(self, kind: int) -> Subject:
        """Return what the transfer of the state is for."""
        s = self._node.state
        if kind == LINK_LOAD:
            return self._models[int(s.h2d_model)]
        if kind == LINK_STREAM:
            return self.gate if s.h2d_request == s.lb_id else None
        return self._rows[int(s.h2d_request)]

    def _job(self, of: Subject) -> Callable[[], Any]:
        """Return what the worker has to do; from now on it counts as being done."""
        if of is None:
            return _nothing
        if isinstance(of, Sequence_):
            pool = self._models[of.model].pool
            return functools.partial(self._host_kv.restore, pool, of.number)
        if isinstance(of, LinkBoundGate):
            return of.stream_next()
        s, m = self._node.state, self._models.index(of)
        # A load that waited for memory may have lost its target since, and get it back before it
        # ends: the state counts its piece then.
        for pieces in (int(min(s.target[m], s.granted[m])), int(s.granted[m])):
            piece = of.weights.claim_piece(pieces - 1) if pieces else None
            if piece is not None:
                return functools.partial(of.weights.start_piece, piece)
        return _nothing  # it came ahead, for a load that ended early

    def _look_ahead(self) -> None:
        """Queue the transfer that surely comes next.

        Where the state decides otherwise after all, a piece of a load is there when it comes to
        it, and a layer is dropped with its gate.
        """
        # A small model may have computed all layers of an iteration before the state asks for them.
        self.h2d.drop(
            lambda one: (
                isinstance(one.of, LinkBoundGate) and one.of is not self.gate and one.of.over()
            )
        )
        if self.h2d.unfinished is None and (of := self._following()) is not None:
            self.h2d.queue(self._job(of), Transfer(of))
            if isinstance(of, LinkBoundGate) and of is not self.gate:
                self.prefetched += 1

    def _following(self) -> ServedModel | LinkBoundGate | None:
        """Return what the next transfer is for, if that is sure and it could start at once."""
        s, now = self._node.state, self.h2d.current
        if s.restore_len:
            return None
        streams = now is not None and now.of is self.gate is not None
        # A layer whose slot is not free leaves the link to a load.
        streaming = s.lb_kind != IDLE and int(s.lb_layers) > int(streams) and not s.stream_hold
        if s.load_len:
            if now is None or not (streams or isinstance(now.of, ServedModel)):
                return None
            if streams or not streaming:  # they take turns
                return self._next_load(now)
        if streaming:
            ready = now is not None and self.gate is not None and self.gate.next_can_come
            return self.gate if ready else None
        if (now is None or streams) and (m := self._node.foresee_stream()) >= 0:
            return self._prefetch(m)
        return None

    def _next_load(self, now: Transfer) -> ServedModel | None:
        """Return the model whose piece is loaded next, if one is left."""
        s = self._node.state
        m = int(s.load_queue[0])
        coming = [now, *self.h2d.ahead]
        model = self._models[m]
        left = int(min(s.target[m], s.granted[m]) - s.landed[m])
        return model if left > sum(one.of is model for one in coming) else None

    def _prefetch(self, m: int) -> LinkBoundGate | None:
        """Return the gate of a model's next link-bound iteration if a layer of it can come now."""
        if self.gate is None:
            gate = self._models[m].weights.early_gate
        elif self.gate.claimed < len(self.gate.streamed):
            return None
        else:
            gate = self.gate.following()
        return gate if gate is not None and gate.next_can_come else None


def _nothing() -> None:
    """Do a transfer of which nothing is left to do."""
