"""`MultiModelServingEnv`: one simulated node as a Gymnasium environment."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsInt, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.error import ResetNeeded

from mmrl.envs.batch import TERMINATED, TRUNCATED, ServingBatch
from mmrl.envs.timeline import Recorder, Timeline
from mmrl.errors import InputError
from mmrl.scenarios.sampler import EpisodeInfo
from mmrl.scenarios.schema import Scenario

if TYPE_CHECKING:
    from mmrl.rules.base import Rule

Observation = npt.NDArray[np.float32]


class MultiModelServingEnv(gym.Env[Observation, np.int64]):
    """Decide which language models hold the memory of one GPU.

    ## Description

    A node serves a fleet of language models whose weights do not all fit into device memory.
    Requests arrive for each model; each has a target for the time to its first token (TTFT) and
    most have one for the time per output token after it (TPOT). At each decision the agent may
    load a model, put one out (its running sequences are saved to the host and resumed later),
    pause or resume one, or wait. Loading costs seconds on the link between host and device; what
    it is worth depends on who waits, who runs, and what will arrive.

    The node is simulated event by event on measured costs: prefill in chunks, decoding in
    batches, transfers in pieces that share the link, and KV cache in blocks. `docs/semantics.md`
    says exactly what happens. Decisions are asked for on an arrival, a completion, the end of a
    load or KV move, and after 0.25 s at the latest, but only when some verb is legal; so the time
    between two steps varies and is told as `info["dt"]`.

    ## Action Space

    `Discrete(1 + max_models * V)`. Action 0 waits. Action `1 + m * V + v` is verb `v` of the
    scenario's verb set on model `m`; `env.unwrapped.encode(m, "level100")`,
    `env.unwrapped.decode(action)` and `env.unwrapped.action_names` translate.

    | verb set | V | verbs |
    |---|---|---|
    | `core` | 4 | `out`, `level100`, `pause`, `resume` |
    | `full` | 9 | those, with `level0`, `level25`, `level50`, `level75` after `out`, then `focus` |

    A verb other than waiting takes no time: the next decision is at the same instant, until the
    agent waits or no verb is legal. Which actions are legal is told by `action_masks()` (bool) and
    by `info["action_mask"]` (int8, for `action_space.sample(mask=...)`); waiting always is. An
    illegal action waits and is counted in `info["illegal_actions"]`.

    ## Observation Space

    `Box(-1, 1, (16 + 47 * max_models,), float32)`: the features of the node, then one block per
    model, zeros where the fleet is smaller than `max_models`. `env.unwrapped.feature_names` names
    each number. Counts and times are squashed, `x / (|x| + scale)`; "against" gives the scale.
    Nothing tells a model or a platform by name, and nothing comes from the future.

    | feature of the node | meaning |
    |---|---|
    | `free` | memory that nothing holds, of the budget |
    | `releasing` | memory whose release is decided but not done, of the budget |
    | `promised` | memory that loads wait for, of the budget |
    | `evictable` | memory held by idle models, of the budget |
    | `link_backlog` | seconds of loads queued, against 1 s |
    | `kv_backlog` | KV moves queued, against 8 |
    | `link_bound` | 1 while an iteration waits for streamed layers |
    | `lacking` | models that are out while requests wait for them, against 4 |
    | `running` | models with sequences that decode, against 4 |
    | `models` | size of the fleet, of 16 |
    | `pressure` | weights of the fleet over the budget, against 1 |
    | `arrivals` | arrivals per second, averaged over a minute, against 4 |
    | `since_decision` | time since the previous decision, against 0.25 s |
    | `dispatch_edf`, `dispatch_las` | 1 for the rule that gives the device to a model |
    | `full_verbs` | 1 for the verb set `full` |

    | feature of a model | meaning |
    |---|---|
    | `weights` | size, of the budget |
    | `layers` | against 32 |
    | `resident`, `target`, `granted` | weights on the device, wanted, with memory taken; 0 to 1 |
    | `load_left` | time to the end of its load if it had the link alone, against 1 s |
    | `load` | time of a whole load, against 1 s |
    | `since_loaded` | time since its load ended, against its whole load |
    | `queued` | waiting requests, against 8 |
    | `oldest_wait` | wait of the oldest, over its TTFT target, against 1 |
    | `head_slack` | time left to the TTFT target of the next request, over the target, clipped |
    | `head_slack_loaded` | the same less load and prefill |
    | `head_expired` | 1 when every waiting request is past its TTFT target |
    | `head_prefill` | prefill time of the next request, against 1 s |
    | `decoding` | running sequences, against 8 |
    | `prefilling` | 1 while a request is in prefill |
    | `suspended` | sequences preempted or on their way back, against 8 |
    | `paused` | 1 when paused |
    | `tpot_slack_min` | time that running sequences are ahead, against 1 s |
    | `tpot_slack_mean` | their mean; a sequence without a TPOT target counts as 0 |
    | `suspended_slack_min` | the same for suspended sequences |
    | `generated` | mean tokens generated by running sequences, against 200 |
    | `output` | mean output of requests done, against 200 tokens |
    | `remaining` | expected time to finish the running sequences, against 1 s |
    | `kv` | KV cache on the device, of the budget |
    | `kv_move` | time to save it, against 0.1 s |
    | `rate_short`, `rate_long` | arrivals per second over 10 s and 60 s, against 1 |
    | `since_used`, `since_arrival` | time since its last iteration and last arrival, against 10 s |
    | `step_over_tpot` | time of a decode step over a TPOT target (the last begun), against 1 |
    | `step` | time of a decode step when resident, against 0.05 s |
    | `step_level0`, `step_level25`, `step_level50`, `step_level75` | per level, against 0.25 s |
    | `focus` | 1 when it has the focus |
    | `acted_residency`, `acted_run`, `acted_focus` | 1 when such a verb was used at this instant |
    | `idle` | 1 when it holds weights that nobody uses |
    | `lacks_weights` | 1 when it is out and requests wait for it |
    | `gdsf` | its priority in the eviction order above the clock, against 1 |
    | `in_link_bound` | 1 while an iteration of it waits for streamed layers |
    | `head_kv` | KV cache that its next request needs, of the budget, against 0.05 |
    | `head_room` | memory it could have without a preemption, less that, against 0.05 |
    | `starved` | 1 when it has its weights, and less room than that KV cache or than is promised |

    `suggestion` adds a one-hot block over the actions, `suggestion.<action>`, and gives the node
    the rule's dispatch, so that to do as suggested is to be the rule. `privileged` adds, last,
    `future.model<m>.<name>` for a critic in training: arrivals within 1, 3, 8, 20 and 40 s, and
    output tokens still to come.

    ## Rewards

    `-1` when it becomes certain that a request misses a target (its first or its last token can no
    longer be in time, or its queue was full), and a small cost for each second that a request
    spends in the system, over its latency alone on an idle node. The weights are the scenario's.
    `info["miss_reward"]` and `info["latency_reward"]` are the two parts.

    ## Starting State

    An empty node at time 0 with all models out, advanced to the first decision. Fleet, budget,
    load, workload and the requests themselves are drawn from the scenario.

    ## Episode End

    Terminated when every request has ended; truncated at the scenario's horizon. Serving is a
    continuing task: bootstrap where an episode is truncated.

    `info` holds `action_mask`, `dt` (simulated seconds that the step took), `time_s`,
    `miss_reward`, `latency_reward` and `illegal_actions`; at the end of an episode also `metrics`:
    goodput and more. `env.unwrapped.episode` says what was drawn.

    ## Arguments

    ```python
    import gymnasium as gym
    import mmrl

    env = gym.make("mmrl/MultiModelServing-v0", scenario="demo")
    ```

    | argument | default | meaning |
    |---|---|---|
    | `scenario` | `"demo"` | name of a scenario, path of a TOML file, or a `Scenario` |
    | `max_models` | `None` | pad to fleets of this size; the scenario's largest unless given |
    | `render_mode` | `None` | `"ansi"` or `"rgb_array"` |
    | `strict` | `False` | an illegal action raises instead of waiting |
    | `suggestion` | `None` | a rule to observe: a name, or a mapping of `name` and parameters |
    | `privileged` | `False` | observe the future; for training a critic only |

    `reset(options=...)` takes `episode` (with `split`: `"dev"` or another) for one of the frozen
    episodes, `load` for a fixed load, and `trace` for a `Trace` that is played as it is.

    ## Vectorized environment

    `gym.make_vec("mmrl/MultiModelServing-v0", num_envs=256)` advances all nodes in one compiled
    call; finished environments are reset in the same step (`AutoresetMode.SAME_STEP`). For
    Stable-Baselines3 use `mmrl.envs.sb3.MultiModelServingVecEnv`. Sub-environment `i` of both
    equals this environment with seed `seed + i` bit for bit.

    ## Version History

    * v0: first version
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # noqa: RUF012

    def __init__(
        self,
        scenario: str | Path | Scenario = "demo",
        max_models: int | None = None,
        render_mode: str | None = None,
        strict: bool = False,
        suggestion: "str | Mapping[str, Any] | Rule | None" = None,
        privileged: bool = False,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise InputError(f"render_mode is {render_mode!r}", "use None, ansi or rgb_array")
        self.render_mode = render_mode
        self.strict = strict
        self.batch = ServingBatch(scenario, 1, max_models, suggestion, privileged)
        self.layout = self.batch.layout
        self.observation_space = cast("spaces.Space[Observation]", self.layout.observation_space)
        self.action_space = self.layout.action_space
        self.feature_names = self.layout.feature_names
        self.action_names = self.layout.action_names
        self.encode = self.layout.encode
        self.decode = self.layout.decode
        self._action = np.zeros(1, np.int64)
        self._recorder: Recorder | None = None

    @property
    def episode(self) -> EpisodeInfo:
        """What was drawn at the last reset: platform, fleet, budget, load."""
        self._require_reset()
        return self.batch.info(0)

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which actions are legal now, bool[num_actions]; waiting always is."""
        masks: npt.NDArray[np.bool_] = self.batch.masks()[0]
        return masks

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Draw an episode; see the class for ``options``.

        Raises:
            InputError: An option is unknown or wrong.
        """
        super().reset(seed=seed)
        self.batch.reset(0, self.np_random, options)
        self._action[0] = 0
        if self.render_mode is not None:
            self._recorder = Recorder(self.batch.simulator, self.action_names)
        return self.batch.observe()[0], self._info()

    def step(self, action: SupportsInt) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Do one action; see the class for what comes back.

        Raises:
            InputError: The action is illegal and the environment strict.
            ResetNeeded: There was no reset before the first step.
        """
        self._require_reset()
        self._action[0] = int(action)
        if self.strict:
            self._require_legal(int(action))
        if self._recorder is not None:
            self._recorder.step(int(action))
        else:
            self.batch.simulator.step(self._action)
        done = int(self.batch.field("done")[0])
        info = self._info()
        if done:
            info["metrics"] = self.batch.metrics(0)
        reward = info["miss_reward"] + info["latency_reward"]
        return self.batch.observe()[0], reward, done == TERMINATED, done == TRUNCATED, info

    def timeline(self) -> Timeline:
        """Return the timeline of the episode so far; recorded when there is a render mode.

        Raises:
            ResetNeeded: There was no reset, or there is no render mode.
        """
        if self._recorder is None:
            raise ResetNeeded("No timeline: give a render_mode and call reset.")
        return self._recorder.timeline()

    def render(self) -> Any:
        """Return the node as a table (``ansi``) or the timeline as an image (``rgb_array``).

        Raises:
            DependencyNotInstalled: Pillow is missing, which draws the image.
        """
        if self.render_mode is None:
            gym.logger.warn("render() does nothing: make the environment with a render_mode")
            return None
        self._require_reset()
        from mmrl.envs import render

        if self.render_mode == "ansi":
            action = int(self._action[0])
            return render.table(self.batch.simulator, self.action_names[action])
        return render.picture(self.timeline())

    def _info(self) -> dict[str, Any]:
        simulator, field = self.batch.simulator, self.batch.field
        return {
            "action_mask": self.batch.masks()[0].view(np.int8),
            "dt": float(simulator.dt_s[0]),
            "time_s": int(field("now_ns")[0]) * 1e-9,
            "miss_reward": float(simulator.reward_terms[0, 0]) + 0.0,  # -0.0 looks odd
            "latency_reward": float(simulator.reward_terms[0, 1]) + 0.0,
            "illegal_actions": int(field("illegal_actions")[0]),
        }

    def _require_reset(self) -> None:
        if self.batch.simulator.infos[0] is None:
            raise ResetNeeded("Call reset before anything else.")

    def _require_legal(self, action: int) -> None:
        masks = self.action_masks()
        if not 0 <= action < len(masks) or not masks[action]:
            legal = [self.action_names[a] for a in np.flatnonzero(masks)]
            name = self.action_names[action] if 0 <= action < len(masks) else str(action)
            raise InputError(f"action {name} is illegal now", f"legal: {', '.join(legal)}")
