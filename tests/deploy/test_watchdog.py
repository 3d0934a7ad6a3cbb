"""The log says where threads are while a node stands still, once, and when it goes on."""

import logging
import threading
import time

import pytest

from mmrl.deploy.watchdog import Watchdog, where


@pytest.mark.parametrize("life", [(2, True), (1, False)], ids=["gets on", "has nothing to do"])
def test_a_node_that_stands_still_is_told_once_with_where_it_is(
    life: tuple[int, bool], caplog: pytest.LogCaptureFixture
) -> None:
    gate, told = threading.Event(), threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.set()

    def stand_still() -> None:
        watchdog.see(1, True)
        while not gate.wait(0.01):
            watchdog.see(1, True)
        watchdog.see(*life)

    logger = logging.getLogger("mmrl.engine")
    logger.addHandler(listener := Listener())
    watchdog = Watchdog(after_s=0.05)
    loop = threading.Thread(target=stand_still, name="the loop")
    try:
        loop.start()
        assert told.wait(60)
        time.sleep(0.2)  # in which it is not told again
        gate.set()
        loop.join()
    finally:
        watchdog.close()
        logger.removeHandler(listener)
    first, last = caplog.records[:2]  # it may be late once more before it is closed
    assert first.getMessage().startswith("the node has stood still for")
    assert any("stand_still" in line for line in first.fields["threads"]["the loop"])  # type: ignore[attr-defined]
    assert last.getMessage().startswith("the node goes on, after")


def test_a_node_that_gets_on_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    watchdog = Watchdog(after_s=60)
    watchdog.see(1, True)
    watchdog.close()
    assert not caplog.records


def test_where_threads_are_has_the_innermost_call_first() -> None:
    gate, there = threading.Event(), threading.Event()

    def inner() -> None:
        there.set()
        gate.wait(60)

    def outer() -> None:
        inner()

    thread = threading.Thread(target=outer, name="nested")
    thread.start()
    assert there.wait(60)
    stack = [line.rpartition(" ")[2] for line in where()["nested"]]
    gate.set()
    thread.join()
    assert threading.current_thread().name not in where()
    assert [name for name in stack if name in ("inner", "outer")] == ["inner", "outer"]
