"""When a waiting loop goes on."""

from types import SimpleNamespace
from typing import Any

from mmrl.deploy.clock import RealTime
from mmrl.deploy.workers import Inbox
from mmrl.node.state import new_nodes


def test_what_came_while_the_loop_waited_for_a_worker_is_done_at_once() -> None:
    state = new_nodes(1)[0]
    state.due_ns = state.timer_ns = 60 * 10**9
    inbox, waited = Inbox(), list[float]()
    engine: Any = SimpleNamespace(
        node=SimpleNamespace(state=state), inbox=inbox, deciding=False, ended=set
    )
    inbox.put(lambda: None)
    inbox.put(None)
    inbox.wait(lambda: len(inbox.calls) > 0)  # as for the end of an abandoned iteration
    inbox.receive = waited.append  # type: ignore[method-assign]
    RealTime().wait(engine)
    inbox.calls.clear()
    RealTime().wait(engine)
    assert waited[0] == 0 < waited[1]


def test_a_loop_that_waits_for_a_worker_gives_signs_of_life() -> None:
    inbox, signs = Inbox(), list[None]()
    inbox.waiting = lambda: signs.append(None)
    inbox.wait(lambda: len(signs) > 1)  # though no message ever comes
    assert len(signs) == 2
