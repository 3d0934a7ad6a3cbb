"""What partial residency and preemption cost: a few formulas over one model's `CostModel`.

They are those of docs/semantics.md: an iteration that lacks layers ends when both its compute and
its bytes are done; the link moves one layer at a time, and streams and loads take turns; KV moves
in blocks, sequence by sequence. Residency is a number of layers, not necessarily whole.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from mmrl.node.state import BLOCK_TOKENS
from mmrl.profiles.costs import CostModel
from mmrl.profiles.link import on_link, step_s
from mmrl.profiles.schema import Platform, Profile

OUTPUT_KNOTS = 33  # contexts at which the steps of an output are priced


@dataclass(frozen=True)
class Case:
    """A model on a platform.

    Attributes:
        platform: The platform.
        profile: The model's profile there.
        costs: Its cost model.
    """

    platform: Platform
    profile: Profile
    costs: CostModel

    @classmethod
    def of(cls, platform: Platform, profile: Profile) -> "Case":
        """Return the case of a profile."""
        return cls(platform, profile, CostModel(profile))

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self.profile.layers

    def step_s(self, resident_layers: float, batch: int, context: int) -> float:
        """Return the time of a decode step of a model that is alone on the device."""
        return step_s(self.costs, resident_layers, batch, context)

    def step_beside_load_s(self, resident_layers: float, batch: int, context: int) -> float:
        """Return the time of a step while a model with layers of this size is loaded.

        Streamed layers and the other model's take turns on the link.
        """
        compute = self._slowed(self.costs.decode_s(batch, context), "beside_load")
        missing = self.layers - resident_layers
        if missing == 0:
            return compute
        other = self.profile.layer_bytes / self.profile.load.bytes_per_s
        turn = self.costs.stream_layer_s(batch) + other
        return max(compute, self.profile.stream.fixed_s + missing * turn)

    def host_step_s(self, resident_layers: float, batch: int, context: int) -> float | None:
        """Return the time of a step whose missing layers are computed on the host, one by one.

        None where that was not measured, or not for so many sequences.
        """
        layer_s = self.costs.host_layer_s(batch)
        if layer_s is None or batch > self.profile.host_layer_s[-1].tokens:
            return None
        missing = self.layers - resident_layers
        resident_share = resident_layers / self.layers
        return self.costs.decode_s(batch, context) * resident_share + missing * layer_s

    def neighbour_factor(self, resident_layers: float, batch: int, context: int) -> float:
        """Return by how much this model stretches the steps of a resident copy of itself.

        While this model waits for the link, the neighbour's steps run: of an iteration of length T
        with compute c, T - c is the neighbour's. Both resident, they alternate: a factor of 2.
        """
        compute = self.costs.decode_s(batch, context)
        missing = self.layers - resident_layers
        if missing == 0:
            return 2.0
        alone = self._slowed(compute, "beside_stream")
        link = self.profile.stream.fixed_s + missing * self.costs.stream_layer_s(batch)
        waits = max(link - compute, alone)  # at least one step of the neighbour goes between
        return (compute + waits) / waits * alone / compute

    def _slowed(self, seconds: float, beside: str) -> float:
        slowdown = self.profile.slowdown
        return seconds if slowdown is None else seconds * max(1.0, getattr(slowdown, beside))

    def knee(self, batch: int, context: int) -> float:
        """Return the residency, 0 to 1, below which the link paces a step: the corner of its curve.

        There ``fixed + missing layers * streamed layer`` is the compute time.
        """
        spare = self.costs.decode_s(batch, context) - self.profile.stream.fixed_s
        missing = max(0.0, spare / self.costs.stream_layer_s(batch))
        return max(0.0, 1 - missing / self.layers)

    def residency_for(self, share: float, batch: int, context: int) -> float:
        """Return the lowest residency, 0 to 1, that keeps a share of the resident throughput.

        The model holds whole layers.
        """
        compute = self.costs.decode_s(batch, context)
        for layers in range(self.layers + 1):
            if self.step_s(layers, batch, context) * share <= compute:
                return layers / self.layers
        return 1.0

    def mean_step_s(
        self, step: Callable[[float, int, int], float], resident: float, prompt: int, output: int
    ) -> float:
        """Return the mean step of an output at batch 1, whose context grows from the prompt's.

        Args:
            step: ``step_s`` or another of this case's steps.
            resident: Layers on the device.
            prompt: Tokens of the prompt.
            output: Tokens of the output, at least 2.
        """
        knots = np.linspace(prompt, prompt + output - 1, OUTPUT_KNOTS)
        times = [step(resident, 1, int(context)) for context in knots]
        return float(np.trapezoid(times, knots) / (knots[-1] - knots[0]))


@dataclass(frozen=True)
class Preemption:
    """From the decision to put a model out to its next token, in seconds, part by part.

    What the model that takes its place does in between is left out.

    Attributes:
        stop_s: To the end of the step in flight, half a step in the mean.
        kv_save_s: KV cache to the host.
        reload_s: The weights that it held, back to the device.
        kv_restore_s: KV cache back.
        first_step_s: The next step.
    """

    stop_s: float
    kv_save_s: float
    reload_s: float
    kv_restore_s: float
    first_step_s: float

    @property
    def total_s(self) -> float:
        """The whole pause, one part after the other."""
        return self.stop_s + self.overhead_s + self.first_step_s

    @property
    def overhead_s(self) -> float:
        """What it adds to a run if nothing overlaps: the two steps would have come anyway."""
        return self.kv_save_s + self.reload_s + self.kv_restore_s


def preemption(case: Case, batch: int, context: int, resident_layers: float) -> Preemption:
    """Return the pause of a model that is preempted while it decodes ``batch`` sequences.

    Args:
        case: The model on its platform.
        batch: Sequences.
        context: KV tokens of each.
        resident_layers: What it holds when it is put out, and what is loaded again.
    """
    profile, costs = case.profile, case.costs
    kv_bytes = -(-context // BLOCK_TOKENS) * BLOCK_TOKENS * profile.kv_bytes_per_token
    step = case.step_s(resident_layers, batch, context)
    return Preemption(
        stop_s=step / 2,
        kv_save_s=batch * costs.kv_save_s(kv_bytes),
        reload_s=costs.load_s(profile.base_bytes + resident_layers * profile.layer_bytes),
        kv_restore_s=batch * costs.kv_restore_s(kv_bytes),
        first_step_s=step,
    )


def with_link(case: Case, bytes_per_s: float) -> Case:
    """Return the case on a link of another rate, see `on_link`."""
    return Case.of(*on_link(case.platform, case.profile, bytes_per_s))


def all_streamed_s(costs: CostModel, tokens: int) -> float:
    """Return what the link takes for an iteration over ``tokens`` tokens without any layer."""
    profile = costs.profile
    return profile.stream.fixed_s + profile.layers * costs.stream_layer_s(tokens)


def host_crossing_tokens(costs: CostModel) -> float | None:
    """Return from how many tokens on streaming all layers is faster than computing on the host.

    Linear between the points that were measured; infinity where the host is faster at the last of
    them, None where nothing was measured.
    """
    points = costs.profile.host_model_s
    if not points:
        return None
    tokens = [point.tokens for point in points]
    ahead = [all_streamed_s(costs, point.tokens) - point.time_s for point in points]
    if ahead[-1] > 0:
        return math.inf
    i = max((k for k, lead in enumerate(ahead) if lead > 0), default=-1)
    if i < 0:
        return float(tokens[0])
    share = ahead[i] / (ahead[i] - ahead[i + 1])
    return tokens[i] + share * (tokens[i + 1] - tokens[i])


def host_wins_below(case: Case, batch: int, context: int) -> float | None:
    """Return the residency below which host computation beats streaming, 0 to 1.

    Near full residency streaming always wins, hidden behind the compute. 0 where it wins at every
    residency; None where the host was not measured.
    """

    def lead(resident: float) -> float:
        host_s = case.host_step_s(resident, batch, context)
        assert host_s is not None
        return host_s - case.step_s(resident, batch, context)

    if case.host_step_s(0, batch, context) is None:
        return None
    # Above the knee the host's step is the longer one; at no layer the question is decided.
    knee = case.knee(batch, context) * case.layers
    if lead(0) >= 0 or lead(knee) <= 0:
        return 0.0 if lead(0) >= 0 else knee / case.layers
    return float(brentq(lead, 0, knee)) / case.layers
