"""Metrics worked by hand, censoring included."""

from typing import Any

import numpy as np
import pytest

from mmrl.metrics import episode_metrics, jain
from mmrl.node import state as st
from mmrl.node.state import new_nodes, new_requests

S = 10**9


def episode() -> tuple[Any, Any]:
    """10 s of two models; one request for each fate.

    | | model | arrives | first | ends | output | |
    | 0 | 0 | 0 s | 1 s | 5 s | 5 | good |
    | 1 | 0 | 1 s | 6 s | 8 s | 3 | TTFT missed |
    | 2 | 0 | 4 s | 5 s | - | 9 | decodes, 3 + 2 tokens so far |
    | 3 | 1 | 6 s | - | - | 2 | waits |
    | 4 | 1 | 9 s | - | 9 s | 2 | refused |
    | 5 | 1 | 20 s | - | - | 2 | has not arrived |
    """
    s, r = new_nodes(1)[0], new_requests(1, 8)[0]
    s.n_models, s.n_requests, s.now_ns = 2, 6, 10 * S
    r.model[:6] = 0, 0, 0, 1, 1, 1
    r.arrival_ns[:6] = np.array([0, 1, 4, 6, 9, 20]) * S
    r.first_ns[:6] = np.array([1, 6, 5, -1, -1, -1]) * S
    r.finish_ns[:6] = np.array([5, 8, -1, -1, 9, -1]) * S
    r.first_ns[3:6] = -1
    r.output[:6] = 5, 3, 9, 2, 2, 2
    r.generated[:6] = 5, 3, 3, 0, 0, 0
    r.isolated_ns = 2 * S
    r.state[:6] = st.DONE, st.DONE, st.DECODE, st.QUEUED, st.REFUSED, st.UNARRIVED
    r.miss[:6] = st.MISS_NONE, st.MISS_TTFT, st.MISS_NONE, st.MISS_NONE, st.MISS_REFUSED, 0
    s.seg_steps[0], s.decoding[0] = 2, 1
    s.loads[:2], s.load_bytes[:2], s.preempted[0] = (3, 1), (300, 100), 5
    s.gpu_busy_ns[:2], s.h2d_busy_ns = (4 * S, 1 * S), 2 * S
    return s, r


def test_shares_count_what_is_refused_and_unfinished_as_missed() -> None:
    m = episode_metrics(*episode())
    assert m["requests"] == 5
    assert m["goodput"] == pytest.approx(1 / 5)
    assert m["missed_ttft"] == pytest.approx(1 / 5)
    assert m["refused"] == pytest.approx(1 / 5)
    assert m["unfinished"] == pytest.approx(2 / 5)  # 2 and 3 have missed nothing yet
    assert m["missed_tpot"] == 0.0
    assert (
        sum(m[k] for k in ("goodput", "missed_ttft", "missed_tpot", "refused", "unfinished")) == 1
    )


def test_latencies_are_censored_at_the_end() -> None:
    m = episode_metrics(*episode())
    # TTFT 1, 5, 1, still waiting for 4 s, refused 1 s ago
    assert m["ttft_mean_s"] == pytest.approx(12 / 5)
    assert m["ttft_p50_s"] == pytest.approx(1.0)
    assert m["longest_wait_s"] == pytest.approx(5.0)
    # E2E 5, 7, running for 6 s, 4, 1; alone each would take 2 s
    assert m["e2e_mean_s"] == pytest.approx(23 / 5)
    assert m["norm_latency"] == pytest.approx(23 / 10)
    # TPOT 4 s / 4, 2 s / 2, and 5 s over the 4 tokens after the first so far
    assert m["tpot_mean_s"] == pytest.approx((1 + 1 + 1.25) / 3)
    assert m["e2e_p90_s"] == pytest.approx(np.percentile([5, 7, 6, 4, 1], 90))


def test_models_apart() -> None:
    m = episode_metrics(*episode())
    assert m.models["requests"].tolist() == [3, 2]
    assert m.models["goodput"].tolist() == pytest.approx([1 / 3, 0])
    assert m["goodput_worst_model"] == 0.0
    assert m["fairness"] == pytest.approx(0.5)  # one of two models has everything
    assert m.models["norm_latency"].tolist() == pytest.approx([18 / 6, 5 / 4])


def test_rates_and_shares_of_time() -> None:
    m = episode_metrics(*episode())
    assert m["requests_per_s"] == pytest.approx(2 / 10)
    assert m["output_tokens_per_s"] == pytest.approx((5 + 3 + 3 + 2) / 10)
    assert m["loads_per_s"] == pytest.approx(0.4)
    assert m["load_bytes_per_s"] == pytest.approx(40)
    assert m["preemptions_per_s"] == pytest.approx(0.5)
    assert m["gpu_share"] == pytest.approx(0.5)
    assert m["link_in_share"] == pytest.approx(0.2)


def test_an_episode_without_requests_has_no_goodput() -> None:
    s, r = episode()
    s.n_requests = 0
    m = episode_metrics(s, r)
    assert m["requests"] == 0 and np.isnan(m["goodput"]) and np.isnan(m["ttft_p99_s"])


def test_jain_is_one_for_equal_shares_and_one_in_n_for_one_winner() -> None:
    assert jain(np.full(7, 0.3)) == pytest.approx(1.0)
    assert jain(np.array([1.0, 0, 0, 0])) == pytest.approx(0.25)
    assert jain(np.zeros(3)) == 0.0
