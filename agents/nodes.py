"""`TrainingNodes`: the environments of a training run as one VecEnv.

Nodes of several scenarios side by side, padded to the largest fleet among them and, where some have
the full verbs, to those: one network then learns both verb sets, the mask tells them apart. Each
part is a `MultiModelServingVecEnv` of its own, and parts can be played on several threads: their
compiled code holds no lock, and no part depends on another, so that results do not depend on the
number of threads. The whole state can be taken and set, for training that continues exactly where
it stopped.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.vec_env import VecEnv

from mmrl.agents.export import Floats
from mmrl.envs.batch import ServingBatch
from mmrl.envs.layout import Layout
from mmrl.envs.sb3 import MultiModelServingVecEnv
from mmrl.errors import InputError, unknown
from mmrl.node.actions import CORE_VERBS, FULL_VERBS, VERBS
from mmrl.rules import Rule
from mmrl.scenarios.schema import Scenario

T = TypeVar("T")
Indices = Any
Masks = npt.NDArray[np.bool_]
SMALLEST_PART = 16  # nodes; below that, threads cost more than they bring
LARGEST_PART = 64  # nodes: enough to pay for a call, and enough parts for many threads
QUICK_LOAD_S = 0.75  # up to which the time constants are as they are: an H200 takes 0.05 to 0.5


class Played(NamedTuple):
    """What a step of N nodes led to."""

    observations: Floats
    rewards: npt.NDArray[np.float32]
    dones: npt.NDArray[np.bool_]
    infos: list[dict[str, Any]]


class Part:
    """Some nodes of one scenario, seen and driven through the layout of all parts.

    Args:
        env: The nodes.
        layout: Of all parts: as many models, the verb set as large or larger.
        rows: Their places among all nodes.
        without: Verbs that nobody may use.
        paced: Whether time counts slower where loads take long.
    """

    def __init__(
        self,
        env: MultiModelServingVecEnv,
        layout: Layout,
        rows: slice,
        without: Sequence[str],
        paced: bool,
    ) -> None:
        self.env, self.layout, self.rows = env, layout, rows
        self._paced = paced
        self._places: npt.NDArray[np.int64] | None = None  # of the own actions among all
        if layout.full_verbs and not env.layout.full_verbs:
            models = len(FULL_VERBS) * np.arange(layout.max_models)[:, None]
            self._places = np.concatenate(([0], (1 + models + np.array(CORE_VERBS)).ravel()))
            self._own = np.zeros(layout.num_actions, np.int64)
            self._own[self._places] = np.arange(len(self._places))
        banned = [verb in without for verb in layout.verbs]
        self._banned = np.array([False, *banned * layout.max_models]) if any(banned) else None

    @property
    def batch(self) -> ServingBatch:
        """The simulated nodes."""
        return self.env.batch

    @property
    def num_envs(self) -> int:
        """How many nodes."""
        return self.env.num_envs

    @property
    def last_dt_s(self) -> npt.NDArray[np.float64]:
        """Simulated seconds of the last step, float64[N]."""
        return self.env.last_dt_s

    @property
    def last_reward_terms(self) -> npt.NDArray[np.float64]:
        """Misses and latency of the last step, float64[N, 2]."""
        return self.env.last_reward_terms

    def pace(self) -> npt.NDArray[np.float64]:
        """Return how much longer than `QUICK_LOAD_S` the loads of each fleet take, at least 1.

        float64[N]; 1 unless paced.
        """
        if not self._paced:
            return np.ones(self.num_envs)
        s = self.batch.simulator.node_array
        layers = np.maximum(s["pieces"] - 1, 0)
        load_ns = s["load_fixed_ns"] + s["load_base_ns"] + layers * s["load_layer_ns"]
        there = np.arange(load_ns.shape[1]) < s["n_models"][:, None]
        mean_s = 1e-9 * (load_ns * there).sum(axis=1) / s["n_models"]
        stretch: npt.NDArray[np.float64] = np.maximum(1.0, mean_s / QUICK_LOAD_S)
        return stretch

    def reset(self) -> Floats:
        """Draw an episode for each node."""
        return self._seen(np.asarray(self.env.reset()))

    def observe(self) -> Floats:
        """Return the observations as they are now."""
        return self._seen(np.asarray(self.batch.observe()))

    def action_masks(self) -> Masks:
        """Return which actions are legal now, bool[N, A]."""
        masks = self.env.action_masks()
        if self._places is not None:
            own, masks = masks, np.zeros((len(masks), self.layout.num_actions), np.bool_)
            masks[:, self._places] = own
        if self._banned is not None:
            masks[:, self._banned] = False
        return masks

    def step(self, actions: npt.NDArray[np.int64]) -> Played:
        """Do an action on each node."""
        if self._places is not None:
            actions = self._own[actions]
        observations, rewards, dones, infos = self.env.step(actions)
        if self._places is not None:
            for i in np.flatnonzero(dones):
                last = infos[i]["terminal_observation"]
                infos[i]["terminal_observation"] = self._seen(last[None])[0]
        return Played(
            self._seen(np.asarray(observations)), np.asarray(rewards), np.asarray(dones), infos
        )

    def get_state(self, k: int) -> dict[str, Any]:
        """Return everything on which its episodes depend, named as that of part ``k``."""
        return {f"{k}.{name}": value for name, value in self.env.get_state().items()}

    def set_state(self, k: int, state: Mapping[str, Any]) -> Floats:
        """Continue from the state of part ``k`` among others; return the observations."""
        prefix = f"{k}."
        mine = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        self.env.set_state(mine)
        return self.observe()

    def _seen(self, own: Floats) -> Floats:
        """Spread the suggestion of the own actions over all actions."""
        if self._places is None or not self.layout.suggestion:
            return own
        layout, mine = self.layout, self.env.layout
        out = np.zeros((len(own), layout.observation_size), np.float32)
        out[:, : layout.public_size] = own[:, : layout.public_size]
        out[:, layout.public_size + self._places] = own[:, layout.public_size : mine.actor_size]
        out[:, layout.actor_size :] = own[:, mine.actor_size :]
        return out


@dataclass(frozen=True)
class NodePlan:
    """N nodes, spread evenly over scenarios, in a fixed number of parts.

    Attributes:
        scenarios: What to train on.
        num_envs: How many nodes altogether.
        rule: The rule whose suggestion is observed and whose dispatch is used, or None.
        privileged: Whether the critic's block is observed.
        seed: Of all episodes.
        full_verbs: Whether the layout has the full verbs even if no scenario has them.
        without: Verbs that nobody may use.
        paced: Whether time counts slower where loads take long.

    Raises:
        InputError: There are fewer nodes than scenarios, or no such verb.
    """

    scenarios: Sequence[Scenario]
    num_envs: int
    rule: Rule | None
    privileged: bool
    seed: int
    full_verbs: bool = False
    without: Sequence[str] = ()
    paced: bool = True

    def __post_init__(self) -> None:
        if self.num_envs < len(self.scenarios):
            remedy = f"give at least {len(self.scenarios)}, one each"
            raise InputError(f"envs is {self.num_envs}", remedy)
        for verb in self.without:
            if verb not in VERBS:
                raise unknown("verb", verb, VERBS)

    @property
    def layout(self) -> Layout:
        """Of all nodes: the largest fleet, and the full verbs if any scenario has them."""
        models = max(scenario.largest_fleet for scenario in self.scenarios)
        full_verbs = self.full_verbs or any(s.verbs == "full" for s in self.scenarios)
        return Layout(models, full_verbs, self.rule is not None, self.privileged)

    @property
    def rows(self) -> list[slice]:
        """Places of the nodes of each part."""
        # A fixed number of parts, whatever the threads: seeds belong to the parts.
        scenarios, most = len(self.scenarios), max(4, self.num_envs // LARGEST_PART)
        pieces = max(1, min(most, self.num_envs // SMALLEST_PART) // scenarios)
        sizes = _even(self.num_envs, scenarios * pieces)
        ends = np.cumsum(sizes).tolist()
        return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]

    def part(self, k: int) -> Part:
        """Make part ``k``."""
        layout, rows = self.layout, self.rows[k]
        env = MultiModelServingVecEnv(
            rows.stop - rows.start,
            self.scenarios[k % len(self.scenarios)],
            max_models=layout.max_models,
            suggestion=self.rule,
            privileged=self.privileged,
            split="train",
            seed=self.seed * 1000 + k,
            stagger=True,
        )
        return Part(env, layout, rows, self.without, self.paced)


class PlanNodes(VecEnv):
    """The nodes of a plan as a VecEnv, whoever plays them.

    Args:
        plan: The nodes.
    """

    render_mode = None

    def __init__(self, plan: NodePlan) -> None:
        self.layout = plan.layout
        spaces = self.layout.observation_space, self.layout.action_space
        super().__init__(plan.num_envs, *spaces)

    def get_state(self) -> dict[str, Any]:
        """Return everything on which the episodes to come depend; arrays and text only."""
        raise NotImplementedError

    def set_state(self, state: Mapping[str, Any]) -> Floats:
        """Continue from a state; return the observations float32[N, D] at that point."""
        raise NotImplementedError

    def env_method(
        self, method_name: str, *args: Any, indices: Indices = None, **kwargs: Any
    ) -> list[Any]:
        """Call a method; ``action_masks`` gives a list of one array, see the parts' own."""
        result = getattr(self, method_name)(*args, **kwargs)
        return [result] if method_name == "action_masks" else [result] * self.num_envs

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """Return an attribute, once for each node."""
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        """Set an attribute; it is the same for all nodes."""
        setattr(self, attr_name, value)

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Indices = None) -> list[bool]:
        """Say no: nothing is wrapped."""
        return [False] * self.num_envs


class TrainingNodes(PlanNodes):
    """The nodes of a plan, in this process.

    Args:
        plan: The nodes.
        threads: Threads that step.

    Attributes:
        parts: The nodes in parts that do not depend on each other.
        last_dt_s: float64[N], simulated seconds of the last step.
        last_reward_terms: float64[N, 2], misses and latency.
    """

    def __init__(self, plan: NodePlan, threads: int = 1) -> None:
        self.parts = [plan.part(k) for k in range(len(plan.rows))]
        self.last_dt_s = np.zeros(plan.num_envs)
        self.last_reward_terms = np.zeros((plan.num_envs, 2))
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._actions = np.zeros(plan.num_envs, np.int64)
        self._masks: Masks | None = None  # of now, where they are known
        super().__init__(plan)

    def action_masks(self) -> Masks:
        """Return which actions are legal now, bool[N, A]."""
        if self._masks is None:
            self._masks = np.concatenate([part.action_masks() for part in self.parts])
        return self._masks

    def reset(self) -> Floats:
        """Draw an episode for each node."""
        self._masks = None
        return np.concatenate([part.reset() for part in self.parts])

    def step_async(self, actions: npt.NDArray[np.int64]) -> None:
        """Take the actions of the step, int64[N]."""
        self._actions = actions

    def step_wait(self) -> tuple[Floats, npt.NDArray[np.float32], npt.NDArray[np.bool_], Any]:
        """Do the step on all parts."""
        actions = self._actions
        results = self._on_threads(
            lambda part: (*part.step(actions[part.rows]), part.action_masks())
        )
        observations, rewards, dones, infos, masks = zip(*results, strict=True)
        self._masks = np.concatenate(masks)
        self.last_dt_s = np.concatenate([part.last_dt_s for part in self.parts])
        self.last_reward_terms = np.concatenate([part.last_reward_terms for part in self.parts])
        return (
            np.concatenate(observations),
            np.concatenate(rewards),
            np.concatenate(dones),
            [info for part in infos for info in part],
        )

    def _on_threads(self, work: Callable[[Part], T]) -> list[T]:
        """Return what ``work`` gives for each part; every thread, this one too, does its share.

        Each gets its parts at once: waking a thread takes as long as a few dozen decisions.
        """

        def share(first: int) -> list[T]:
            return [work(part) for part in self.parts[first :: self._threads]]

        others = [self._pool.submit(share, k) for k in range(1, self._threads)]
        results = {0: share(0)} | {k: other.result() for k, other in enumerate(others, 1)}
        return [results[k % self._threads][k // self._threads] for k in range(len(self.parts))]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    # ------------------------------------------------------------------ exact continuation

    def get_state(self) -> dict[str, Any]:
        """Return everything on which the episodes to come depend; arrays and text only."""
        return {k: v for i, part in enumerate(self.parts) for k, v in part.get_state(i).items()}

    def set_state(self, state: Mapping[str, Any]) -> Floats:
        """Continue from a state; return the observations float32[N, D] at that point."""
        self._masks = None
        return np.concatenate([part.set_state(k, state) for k, part in enumerate(self.parts)])


def _even(total: int, parts: int) -> list[int]:
    """Split a total into nearly equal parts."""
    return [total * (k + 1) // parts - total * k // parts for k in range(parts)]
