import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_five_line_policy(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "five_line_policy.py"))["main"]
    goodputs = main(episodes=2)
    assert all(0.3 < goodput <= 1 for goodput in goodputs)
    assert capsys.readouterr().out.count("goodput") == 2


def test_cleanrl_style_ppo_repeats_under_its_seed(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "cleanrl_style_ppo.py"))["main"]
    budget = ["--total-steps=2048", "--num-envs=16", "--num-steps=64"]

    def losses(seed: int) -> list[str]:
        main([*budget, f"--seed={seed}"])
        return [line.split("loss")[1] for line in capsys.readouterr().out.splitlines()]

    assert losses(1) == losses(1) != losses(2)
