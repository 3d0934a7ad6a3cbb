import numpy as np
import pytest

from mmrl.errors import InputError
from mmrl.scenarios.calibrate import NoCrossing, calibrate, find_crossing
from mmrl.scenarios.registry import get_scenario
from mmrl.scenarios.schema import Scenario


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.73, 9.0])
def test_the_search_finds_where_the_goodput_falls_through(threshold: float) -> None:
    tried: list[float] = []

    def goodput(scenario: Scenario, utilisation: float) -> float:
        return 1 - 0.1 * utilisation / threshold

    found, reached = calibrate(get_scenario("demo"), goodput, lambda u, _: tried.append(u))
    assert found == pytest.approx(threshold, rel=0.02)
    assert reached == pytest.approx(0.9, abs=0.002)
    assert len(tried) < 25


def test_noise_is_averaged() -> None:
    noise = np.random.default_rng(0)

    def goodput(scenario: Scenario, utilisation: float) -> float:
        return 0.9 - 0.25 * float(np.log(utilisation / 1.5)) + 0.01 * noise.standard_normal()

    found = [calibrate(get_scenario("demo"), goodput, lambda u, g: None)[0] for _ in range(20)]
    assert np.std(found) / 1.5 < 0.03  # of a single goodput: 0.01 / 0.25
    assert np.mean(found) == pytest.approx(1.5, rel=0.02)


@pytest.mark.parametrize(("constant", "expected"), [(0.95, "above 0.9"), (0.5, "below 0.9")])
def test_a_goodput_out_of_reach_is_said(constant: float, expected: str) -> None:
    with pytest.raises(InputError, match=f"demo.*{expected}"):
        calibrate(get_scenario("demo"), lambda s, u: constant, lambda u, g: None)


def test_no_load_is_claimed_where_nothing_was_played() -> None:
    """Goodput is flat but for noise: a fitted line would cross far away from what was tried."""
    noise = np.random.default_rng(1)
    refused = 0
    for _ in range(50):
        tried: list[float] = []

        def goodput(load: float) -> float:
            return 0.9 + 0.02 * float(noise.standard_normal())

        try:
            found, _ = find_crossing("it", goodput, lambda u, _: tried.append(u), 1.0, (0.1, 10.0))  # noqa: B023
        except NoCrossing:
            refused += 1
        else:
            assert min(tried) <= found * 1.005 and found <= max(tried) * 1.005  # rounded
    assert 0 < refused < 50
