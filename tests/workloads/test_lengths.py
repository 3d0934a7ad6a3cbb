import numpy as np
import pytest

from mmrl.errors import InputError
from mmrl.workloads.generators import WorkloadSpec, sample_trace
from mmrl.workloads.lengths import FAMILIES, family_names, fit_lognormal, length_table, sample_many


def draw(names, n=20_000, **settings):
    table = length_table(names, **settings)
    return sample_many(np.random.default_rng(0), table, np.zeros(n, np.int32))


@pytest.mark.parametrize("name", FAMILIES)
def test_families_have_their_medians_and_spread(name):
    family = FAMILIES[name]
    pairs, batch_work = draw([name], context_limit_tokens=2**20)
    assert np.median(pairs[:, 0]) == pytest.approx(family.prompt_median_tokens, rel=0.05)
    assert np.median(pairs[:, 1]) == pytest.approx(family.output_median_tokens, rel=0.05)
    assert fit_lognormal(pairs[:, 1])[1] == pytest.approx(family.output_sigma, rel=0.05)
    assert pairs[:, 0].max() <= family.prompt_max_tokens
    assert batch_work.all() == batch_work.any() == family.batch_work


def test_the_context_limit_holds_and_nothing_is_empty():
    pairs, _ = draw(["code"], context_limit_tokens=50)
    assert pairs.min() == 1
    assert pairs.sum(axis=1).max() == 50


def test_recorded_pairs_are_drawn_whole():
    recorded = np.array([[10, 1000], [3000, 2]], np.int32)
    pairs, _ = draw(["empirical"], pairs=recorded)
    assert {tuple(pair) for pair in pairs.tolist()} == {(10, 1000), (3000, 2)}
    assert (pairs[:, 0] == 10).mean() == pytest.approx(0.5, abs=0.02)


def test_fit_of_an_exact_log_normal():
    z = np.random.default_rng(1).standard_normal(200_000)
    tokens = np.rint(np.exp(np.log(1000) + 0.5 * z)).astype(np.int32)
    assert fit_lognormal(tokens) == pytest.approx((1000, 0.5), rel=0.01)


def test_names():
    assert family_names("mixed") == list(FAMILIES)
    assert family_names(["chat", "code"]) == ["chat", "code"]
    with pytest.raises(InputError, match="did you mean 'code'"):
        family_names(["chat", "cod"])
    with pytest.raises(InputError, match="need recorded pairs"):
        length_table(["empirical"])


def test_empirical_lengths_from_a_file(tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text("prompt_tokens,output_tokens\n7,70\n")
    spec = WorkloadSpec.model_validate({"lengths": {"family": "empirical", "file": str(path)}})
    trace = sample_trace(spec, ("a",), 5.0, 10.0)
    assert set(trace.prompt_tokens) == {7}
    assert set(trace.output_tokens) == {70}
