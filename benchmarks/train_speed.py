"""Decisions per second of end-to-end training, beside stock MaskablePPO on the same environment.

    python benchmarks/train_speed.py [--scenario h200-24] [--seconds 30] [--threads 2]
        [--processes 0] [--envs 256] [--rollout-steps 64] [--batch-size 2048] [--device cpu]
        [--alone]

Both learn the same lean policy with the same batch sizes, in two passes.
Time spent compiling is not counted. ``--alone`` leaves stock MaskablePPO out, for trying threads,
nodes and devices on a larger host: nodes are played in parts of 64, so that the threads want 64
nodes each, and a minibatch 1,024 decisions for each.
"""

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback

from mmrl.agents.config import TrainConfig
from mmrl.agents.nodes import NodePlan, PlanNodes, TrainingNodes
from mmrl.agents.policy import EquivariantPolicy
from mmrl.agents.ppo import EventTimePPO
from mmrl.agents.processes import NodeProcesses
from mmrl.rules import get_rule
from mmrl.scenarios.registry import get_scenario


class Clock(BaseCallback):
    """Counts decisions for some seconds, from the end of the first iteration on."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.begun = 0.0
        self.rate = 0.0
        self.first = 0

    def _on_step(self) -> bool:
        return not self.rate

    def _on_rollout_start(self) -> None:
        if self.first == 0:
            if self.num_timesteps:
                self.first, self.begun = self.num_timesteps, time.perf_counter()
            return
        elapsed = time.perf_counter() - self.begun
        if elapsed > self.seconds:
            self.rate = (self.num_timesteps - self.first) / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenario", default="h200-24")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--rollout-steps", type=int, default=64)
    parser.add_argument("--envs", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--alone", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = TrainConfig(scenarios=(given.scenario,))
    rates = {}
    for name in ("EventTimePPO", "stock MaskablePPO")[: 1 if given.alone else 2]:
        plan = NodePlan([get_scenario(given.scenario)], given.envs, get_rule("slack"), True, 0)
        nodes: PlanNodes = (
            NodeProcesses(plan, given.processes)
            if given.processes
            else TrainingNodes(plan, given.threads)
        )
        shared = {
            "n_steps": given.rollout_steps,
            "batch_size": given.batch_size,
            "n_epochs": config.epochs,
            "policy_kwargs": {"layout": nodes.layout},
            "device": given.device,
        }
        clock = Clock(given.seconds)
        model: MaskablePPO
        if name == "EventTimePPO":
            model = EventTimePPO(EquivariantPolicy, nodes, threads=given.threads, **shared)
        else:
            model = MaskablePPO(EquivariantPolicy, nodes, **shared)
        model.learn(10**9, clock)
        nodes.close()
        rates[name] = clock.rate
        print(f"{name:<20} {clock.rate:>10,.0f} decisions/s", flush=True)
        if isinstance(model, EventTimePPO):
            each = {k: v / model.num_timesteps * 1e6 for k, v in model.seconds.items()}
            print("  microseconds each: " + ", ".join(f"{k} {v:.0f}" for k, v in each.items()))
    if not given.alone:
        print(f"ratio {rates['EventTimePPO'] / rates['stock MaskablePPO']:.2f}")


if __name__ == "__main__":
    main()
