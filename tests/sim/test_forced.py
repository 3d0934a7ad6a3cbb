"""A log of verbs played again is the same episode; what cannot be done in time is counted."""

from typing import Any

import numpy as np
import pytest

from mmrl.node.actions import LEVEL_100, OUT, PAUSE, WAIT, encode, legal_actions, verb_count
from mmrl.node.state import DONE, NODE, REQUEST, new_nodes, new_requests
from mmrl.sim.forced import Forced, play
from tests.sim.scenes import MS, Scene, random_scene

CACHES = {"head", "head_until_ns"}  # filled whenever somebody looks


def fresh(scene: Scene) -> tuple[Any, Any]:
    """The scene's node and requests, to be played from the start."""
    nodes, table = new_nodes(1), new_requests(1, len(scene[1]))
    nodes[0], table[0] = scene[0], scene[1]
    return nodes[0], np.asarray(table)[0]


def forced(scene: Scene, times_ns: list[int], actions: list[int]) -> tuple[Any, Any, Forced]:
    s, r = fresh(scene)
    log = Forced(s, r, np.array(times_ns, np.int64), np.array(actions, np.int64))
    play(s, r, *scene[2:], log.decide, wake_ns=log.wake_ns, watch=log.look)
    return s, r, log


@pytest.mark.parametrize("seed", range(25))
def test_a_log_played_again_is_the_same_episode(seed: int) -> None:
    scene = random_scene(seed)
    scene[0].horizon_ns = min(scene[0].horizon_ns, 5_000 * MS)
    rng = np.random.default_rng(seed)
    s, r = fresh(scene)
    mask = np.zeros(1 + int(s.n_models) * verb_count(int(s.full_verbs)), np.bool_)
    logged: list[tuple[int, int]] = []

    def decide() -> int:
        legal_actions(s, r, mask)
        action = WAIT if rng.random() < 0.4 else int(rng.choice(np.flatnonzero(mask)))
        if action != WAIT:
            logged.append((int(s.now_ns), action))
        return action

    play(s, r, *scene[2:], decide)
    again, requests, log = forced(scene, *map(list, zip(*logged, strict=True)))
    assert len(logged) > 0 and log.delays_ns == [0] * len(logged)
    assert not log.void and not log.dropped
    for field in set(NODE.names) - CACHES:
        np.testing.assert_array_equal(again[field], s[field], field)
    for field in REQUEST.names:
        np.testing.assert_array_equal(requests[field], r[field], field)


def one_request(arrival_ns: int) -> Scene:
    """One model that fits, and a request to it."""
    scene = random_scene(1, n_models=1, full=True, tight=False, n_requests=1)
    scene[0].horizon_ns, scene[1].arrival_ns = 30_000 * MS, arrival_ns
    return scene


def test_a_verb_that_is_not_legal_yet_is_done_as_soon_as_it_is() -> None:
    pause = encode(1, 0, PAUSE)  # needs somebody to pause
    scene = one_request(100 * MS)
    times = [MS, 70 * MS, 200 * MS]
    s, _, log = forced(scene, times, [encode(1, 0, LEVEL_100), pause, encode(1, 0, PAUSE + 1)])
    assert log.late == 1 and log.delays_ns[0] == 0 and log.delays_ns[2] == 0
    assert 30 * MS <= log.delays_ns[1] <= 36 * MS  # tried every 5 ms
    assert not log.void and not log.dropped and s.illegal_actions == 0


def test_verbs_without_effect_and_never_legal_are_told_apart() -> None:
    scene = one_request(3_000 * MS)
    out, pause, load = (encode(1, 0, verb) for verb in (OUT, PAUSE, LEVEL_100))
    _, r, log = forced(scene, [MS, 2 * MS, 10 * MS, 400 * MS], [out, load, pause, load])
    assert log.void == [0, 3] and log.dropped == [2] and log.delays_ns == [0]
    assert r["state"][0] == DONE
