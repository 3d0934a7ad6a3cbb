"""What is queued on the link before the state asks for it."""

from typing import Any

from mmrl.deploy.served import ServedModel
from mmrl.deploy.streaming import LinkBoundGate
from mmrl.deploy.transfers import Transfer, Transfers
from mmrl.node.state import DECODE_STEP, LINK_LOAD, new_nodes


class Made:
    """Anything, with these attributes."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def test_the_next_piece_of_a_load_follows_at_once_while_no_slot_is_free() -> None:
    """A model streams and loads: it computes no layer before the load has brought some."""
    state = new_nodes(1)[0]
    state.load_queue[0], state.load_len, state.h2d_kind = 0, 1, LINK_LOAD
    state.target[0] = state.granted[0] = 5
    state.landed[0], state.lb_kind, state.lb_layers = 2, DECODE_STEP, 3
    model = ServedModel.__new__(ServedModel)
    made: Any = Made()
    node: Any = Made(state=state)
    transfers = Transfers([model], node, {}, made, made, made, made, ahead=True)
    transfers.gate = LinkBoundGate.__new__(LinkBoundGate)
    transfers.gate.__dict__.update(streamed=(1, 2, 3), claimed=3)  # what is claimed fills the slots
    transfers.h2d.current = Transfer(model)
    assert transfers._following() is None  # the layer could come: it is its turn
    state.stream_hold = 1
    assert transfers._following() is model
    state.landed[0] = 4  # the last piece is on the link
    assert transfers._following() is None
