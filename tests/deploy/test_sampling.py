"""How tokens are chosen: the right distribution, and noise that depends on nothing else."""

import math

import pytest
import torch

from mmrl.deploy.protocol import Sampling
from mmrl.deploy.sampling import Choice, choose, forbid, gumbel, noise_key

VOCABULARY = 40


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def draws(row: torch.Tensor, choice: Choice, count: int) -> torch.Tensor:
    """Shares of the tokens in many draws of one distribution."""
    tokens = choose(row.expand(count, -1), [choice] * count, range(count))
    return torch.bincount(tokens, minlength=len(row)) / count


def test_temperature_zero_takes_the_largest() -> None:
    many = logits(5)
    assert choose(many, [Choice()] * 5, range(5)).tolist() == many.argmax(-1).tolist()
    nearly = [Choice(temperature=1e-9, top_p=0.5)] * 5
    assert choose(many, nearly, range(5)).tolist() == many.argmax(-1).tolist()
    cold = [Choice(temperature=1e-3, seed=seed) for seed in range(5)]
    assert choose(many.half(), cold, range(5)).tolist() == many.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    row = logits(1)[0]
    expected = (row / temperature).softmax(-1)
    seen = draws(row, Choice(temperature=temperature, seed=3), 20_000)
    error = (seen - expected).abs() / (expected * (1 - expected) / 20_000).sqrt().clamp(min=1e-4)
    assert error.max() < 4.5
    assert error.max() > 0.1


def test_top_k_and_top_p_cut_the_tail_and_keep_the_proportions() -> None:
    row = logits(1)[0]
    probabilities, order = row.softmax(-1).sort(descending=True)
    for choice, kept in [
        (Choice(temperature=1.0, top_k=3), 3),
        (Choice(temperature=1.0, top_k=1), 1),
        (Choice(temperature=1.0, top_p=1e-6), 1),
        (Choice(temperature=1.0, top_p=float(probabilities[:4].sum()) - 1e-4), 4),
        (Choice(temperature=1.0, top_p=float(probabilities[:4].sum()) + 1e-4), 5),
        # top_p counts within what top_k has left
        (Choice(temperature=1.0, top_k=3, top_p=0.999), 3),
        (Choice(temperature=1.0, top_k=10**6), VOCABULARY),
    ]:
        expected = torch.zeros(VOCABULARY)
        expected[order[:kept]] = probabilities[:kept] / probabilities[:kept].sum()
        seen = draws(row, choice, 8_000)
        assert (seen - expected).abs().max() < 0.025
        assert seen[expected == 0].sum() == 0
        likely = expected > 0.005
        assert (seen[likely] > 0).all()


def test_a_cut_that_cuts_nothing_draws_the_same() -> None:
    many = logits(64)
    plain = choose(many, [Choice(temperature=0.8, seed=9)] * 64, range(64))
    cut = choose(many, [Choice(temperature=0.8, seed=9, top_k=VOCABULARY)] * 64, range(64))
    assert plain.tolist() == cut.tolist()
    assert len(set(plain.tolist())) > 10


def test_a_token_does_not_depend_on_the_batch() -> None:
    many = logits(40)
    choices = [
        Choice(temperature=[0.0, 0.7, 1.5][i % 3], top_p=[1.0, 0.9][i % 2], top_k=i % 5, seed=i)
        for i in range(40)
    ]
    positions = [1000 - 7 * i for i in range(40)]
    together = choose(many, choices, positions).tolist()
    for i in range(40):
        assert choose(many[i : i + 1], [choices[i]], [positions[i]]).tolist() == [together[i]]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = choose(many[order], [choices[i] for i in order], [positions[i] for i in order])
    assert shuffled.tolist() == [together[i] for i in order]


def test_seed_and_position_change_the_draw() -> None:
    flat = torch.zeros(1, 50_000)
    seen = {
        choose(flat, [Choice(temperature=1.0, seed=seed)], [position]).item()
        for seed in (0, 1, 2**32, 2**62, -1)
        for position in range(20)
    }
    assert len(seen) > 95


def test_noise_is_gumbel_and_independent_between_keys() -> None:
    keys = torch.tensor([noise_key(seed, 5) for seed in range(8)], dtype=torch.int32)
    noise = gumbel(keys, 100_000).double()
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.577216) < 0.01
    assert abs(noise.std() - math.pi / math.sqrt(6)) < 0.01
    assert noise.max() > 12
    correlation = torch.corrcoef(noise).fill_diagonal_(0)
    assert correlation.abs().max() < 0.02
    neighbours = torch.corrcoef(torch.stack([noise[0, :-1], noise[0, 1:]]))[0, 1]
    assert abs(neighbours) < 0.02


def test_noise_is_a_fixed_function() -> None:
    """Written out in whole numbers; tokens of a seed stay the same from release to release."""
    keys = torch.tensor([noise_key(42, 7)], dtype=torch.int32)
    first, second = (word % 2**32 for word in noise_key(42, 7))

    def mix(word: int) -> int:
        word ^= word >> 16
        word = word * 0x7FEB352D % 2**32
        word ^= word >> 15
        word = word * 0x846CA68B % 2**32
        return word ^ (word >> 16)

    for entry, noise in enumerate(gumbel(keys, 300)[0].tolist()):
        word = mix((mix(entry ^ first) + second) % 2**32)
        uniform = ((word & 0x7FFFFFFF) + 0.5) / 2**31
        assert noise == pytest.approx(-math.log(-math.log1p(-uniform)), rel=1e-4, abs=1e-5)


def test_forbidden_tokens_are_impossible_in_their_rows_only() -> None:
    many = logits(3)
    before = many.clone()
    best = many.argmax(-1)
    forbid(many, best.unique(), torch.tensor([True, False, True]))
    assert (many[0, best] == -torch.inf).all()
    assert torch.equal(many[1], before[1])
    assert int((many != before).sum()) == 2 * len(best.unique())
    choices = [Choice(temperature=1.0, seed=seed, top_p=0.99) for seed in range(3)]
    for position in range(200):
        tokens = choose(many, choices, [position] * 3)
        assert tokens[0] not in best and tokens[2] not in best
    forbid(many, torch.empty(0, dtype=torch.int64), torch.tensor([True] * 3))


def test_a_choice_carries_what_a_request_says() -> None:
    choice = Choice.of(Sampling(temperature=0.3, top_p=0.8, top_k=4), seed=12, no_eos=True)
    assert choice == Choice(0.3, 0.8, 4, 12, True)
    assert not choice.greedy and Choice.of(Sampling(temperature=0), 1).greedy
