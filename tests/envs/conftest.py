import pytest

from mmrl.scenarios.registry import get_scenario
from mmrl.scenarios.schema import Scenario


@pytest.fixture(scope="session")
def busy() -> Scenario:
    """Six models that compete hard for 14 s, under the core verbs."""
    return get_scenario("demo", utilisation_at_load_1=2.5, duration_s=10, drain_s=4)


@pytest.fixture(scope="session")
def full() -> Scenario:
    """The same with partial levels and focus."""
    return get_scenario(
        "demo", utilisation_at_load_1=2.5, duration_s=10, drain_s=4, verbs="full", jitter=0.1
    )
