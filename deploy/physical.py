"""`PhysicalMemory`: device memory follows the state.

Weights and KV blocks are committed where the state has granted them, and given back where it has
taken them away. What a step ahead of the state still uses is given back when that has ended; until
then what the state grants for it cannot be taken, and no iteration starts. What frees memory goes
on: saves, and the layers of the link-bound iteration.
"""

from collections.abc import Sequence

from mmrl.deploy.iterations import Iterations
from mmrl.deploy.memory import BudgetExceeded
from mmrl.deploy.node import LiveNode
from mmrl.deploy.served import Rows, Sequence_, ServedModel
from mmrl.deploy.transfers import Transfers
from mmrl.deploy.weights import ModelWeights
from mmrl.node.state import DONE


class PhysicalMemory:
    """The device memory of a fleet.

    Args:
        models: The fleet.
        node: The state.
        rows: The requests in it; those that have ended and hold nothing more are forgotten here.
        iterations: What uses it.
        transfers: What uses it too.

    Attributes:
        unsettled: Rows whose KV blocks are still to be resized.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        node: LiveNode,
        rows: Rows,
        iterations: Iterations,
        transfers: Transfers,
    ) -> None:
        self._models, self._node, self._rows = models, node, rows
        self._iterations, self._transfers = iterations, transfers
        self.unsettled: list[int] = []

    @property
    def ungranted(self) -> list[int]:
        """Models whose granted weights have no memory yet."""
        granted = self._node.state.granted
        return [m for m, one in enumerate(self._models) if granted[m] > _pieces(one.weights)]

    def give_back(self) -> None:
        """Give back what the state has taken away.

        After every transition that can take: what is granted again at the same instant has to be
        loaded again.
        """
        self._iterations.drop_abandoned()
        running = self._iterations.ahead_model  # gives back when its step has ended
        for m, model in enumerate(self._models):
            pieces, weights = int(self._node.state.granted[m]), model.weights
            if pieces < _pieces(weights) and m != running:
                self._transfers.forget(model)
                weights.set_granted(weights.choose(pieces - 1) if pieces else None)
        self._transfers.free_saved()
        left = []
        for row in dict.fromkeys(self.unsettled + self._node.kv_changes()):
            sequence = self._rows[row]
            pool, blocks = self._models[sequence.model].pool, self._node.blocks(row)
            if blocks > len(pool.table(sequence.number)) or sequence.model == running:
                left.append(row)
                continue
            pool.resize(sequence.number, blocks)
            if self._node.requests[row]["state"] >= DONE:
                del self._rows[row]
        self.unsettled = left

    def forget(self, sequence: Sequence_) -> None:
        """Forget a request that has ended, unless it holds blocks: then they are given back first.

        One that ends before it has begun never held any, but its prompt takes memory.
        """
        row = sequence.row
        if self._node.blocks(row) == 0 and row not in self.unsettled:
            self._rows.pop(row, None)

    def take_granted(self) -> bool:
        """Take what the state has granted.

        Returns:
            Whether all of it could be taken; if not, no iteration may start yet.
        """
        self.give_back()
        try:
            self._grow()
        except BudgetExceeded:
            self._compact_pools()
            try:
                self._grow()
            except BudgetExceeded:  # when what is in flight has ended, more can be moved
                return False
        return True

    def _grow(self) -> None:
        """Take the memory that the state has granted.

        Raises:
            BudgetExceeded: Blocks lie scattered and hold more memory than they need.
        """
        for m, model in enumerate(self._models):
            pieces, weights = int(self._node.state.granted[m]), model.weights
            if pieces > _pieces(weights):
                weights.set_granted(weights.choose(pieces - 1))
        for row in list(self.unsettled):
            sequence = self._rows[row]
            pool, blocks = self._models[sequence.model].pool, self._node.blocks(row)
            if blocks > len(pool.table(sequence.number)):
                pool.resize(sequence.number, blocks)
                self.unsettled.remove(row)

    def _compact_pools(self) -> None:
        """Close the holes of all pools, moving what nothing in flight uses."""
        running, moving = self._iterations.models_in_use, self._transfers.moving
        movable: dict[int, set[int]] = {m: set() for m in range(len(self._models))}
        for sequence in self._rows.values():
            if sequence not in moving and sequence.model not in running:
                movable[sequence.model].add(sequence.number)
        for m, model in enumerate(self._models):
            model.pool.compact(movable[m])


def _pieces(weights: ModelWeights) -> int:
    """Return for how many pieces device memory is committed."""
    return 0 if weights.granted is None else 1 + len(weights.granted)
