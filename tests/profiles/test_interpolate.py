import numpy as np
import pytest

from mmrl.profiles.costs import CostModel
from mmrl.profiles.interpolate import MARK, interpolated_profile, interpolated_profiles
from mmrl.profiles.registry import get_platform, get_profile

NEIGHBOURS = [("qwen2.5-0.5b", "qwen2.5-1.5b"), ("qwen2.5-7b", "qwen2.5-14b")]
FLEET = ["qwen2.5-0.5b", "qwen2.5-1.5b", "llama3.2-3b", "qwen2.5-7b", "qwen2.5-14b"]
POINTS = [(1, 512), (8, 2048), (64, 8192)]


@pytest.mark.parametrize("platform", ["h200", "consumer-pcie4"])
@pytest.mark.parametrize(("small", "large"), NEIGHBOURS)
def test_at_the_ends_it_is_the_neighbour(platform: str, small: str, large: str) -> None:
    place = get_platform(platform)
    ends = get_profile(platform, small), get_profile(platform, large)
    for share, end in enumerate(ends):
        made = CostModel(interpolated_profile(place, *ends, share))
        known = CostModel(end)
        assert made.profile.architecture == end.architecture
        assert made.profile.weight_bytes == pytest.approx(end.weight_bytes, rel=0.06)
        for batch, context in POINTS:
            assert made.decode_s(batch, context) == pytest.approx(known.decode_s(batch, context))
        for tokens in (128, 2048, 16384):
            assert made.prefill_s(tokens) == pytest.approx(known.prefill_s(tokens), rel=0.02)


@pytest.mark.parametrize("platform", ["h200", "study-a6000"])
def test_between_the_ends_everything_grows_smoothly(platform: str) -> None:
    place = get_platform(platform)
    ends = [get_profile(platform, name) for name in NEIGHBOURS[1]]
    row = [interpolated_profile(place, *ends, share) for share in np.linspace(0, 1, 9)]
    for batch, context in POINTS:
        times = np.log([CostModel(profile).decode_s(batch, context) for profile in row])
        steps = np.diff(times)
        assert (steps > 0).all()
        assert steps.max() < 0.3  # of the whole way, layers are counted in whole numbers
    sizes = [profile.parameters for profile in row]
    assert sizes == sorted(sizes)
    assert all(profile.kind == "derived" for profile in row)


def test_so_many_between_each_two() -> None:
    place = get_platform("h200")
    known = [get_profile("h200", name) for name in ("qwen2.5-7b", "qwen2.5-0.5b", "llama3.2-3b")]
    found = interpolated_profiles(place, known, 2)
    assert [profile.model[0] for profile in found] == [MARK] * 4
    sizes = [profile.parameters / 1e9 for profile in found]
    assert sizes == sorted(sizes)
    assert 0.49 < sizes[0] < sizes[1] < 3.2 < sizes[2] < sizes[3] < 7.6
    assert interpolated_profiles(place, known[:1] * 2, 3) == []


def test_sizes_that_look_alike_have_names_of_their_own() -> None:
    place = get_platform("h200")
    alike = [get_profile("h200", name) for name in ("qwen2.5-7b", "llama3.1-8b")]
    names = [profile.model for profile in interpolated_profiles(place, alike, 8)]
    assert len(set(names)) == len(names) == 8
    assert any(name.endswith("-2") for name in names)
    # those of universal, on which policies were trained, are called as ever
    known = [get_profile("h200", name) for name in FLEET]
    expected = ["~0.71b", "~1.07b", "~1.93b", "~2.49b", "~4.11b", "~5.79b", "~9.46b", "~11.71b"]
    assert [profile.model for profile in interpolated_profiles(place, known, 2)] == expected
