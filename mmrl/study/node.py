"""A preemption as a node does it: played through the reference simulator, event by event.

The formula of `mmrl.study.formulas` adds parts up; here the same model decodes one sequence, is
put out, saved, loaded again and goes on, and what that adds to the request is read off the clock.
That is less than the parts that move bytes by one step, which computes while the weights land.
"""

import numpy as np

from mmrl.node.actions import WAIT
from mmrl.node.state import SAVED, new_nodes, new_requests
from mmrl.scenarios.bank import CONSTANT_FIELDS, CostBank
from mmrl.sim.reference import ReferenceNode
from mmrl.study.formulas import Case

BEFORE_TOKENS, OUTPUT_TOKENS = 8, 24
PHASES = 4  # instants within a step at which it is stopped
HORIZON_NS = 10**13


def simulated_preemption_s(case: Case, context: int) -> float:
    """Return what one preemption adds to a sequence that is alone, mean over phases of a step.

    Args:
        case: The model on its platform.
        context: Prompt tokens of the sequence.
    """
    bank = CostBank.of((case.profile,))
    step_ns = round(case.costs.decode_s(1, context) * 1e9)
    undisturbed = _finish_ns(bank, context, step_ns, None)
    phases = [(k + 0.5) / PHASES for k in range(PHASES)]
    delays = [_finish_ns(bank, context, step_ns, phase) - undisturbed for phase in phases]
    return float(np.mean(delays)) / 1e9


def _finish_ns(bank: CostBank, context: int, step_ns: int, phase: float | None) -> int:
    """Return when the sequence ends; it is stopped so far into a step unless phase is None."""
    sim = _node(bank, context)
    (request,) = sim.requests
    act(sim, "level100")  # and the load's end is the next decision
    if phase is not None:
        sim.interval_ns = max(1, step_ns // (4 * PHASES))
        sim.timer_ns = sim.now_ns + sim.interval_ns
        while request.generated < BEFORE_TOKENS:
            sim.act(WAIT)
        wanted = sim.now_ns + round(phase * step_ns)
        while sim.now_ns < wanted:
            sim.act(WAIT)
        sim.interval_ns = HORIZON_NS
        act(sim, "out")
        while request.state != SAVED:
            sim.act(WAIT)
        act(sim, "level100")
    while not sim.done:
        sim.act(WAIT)
    return request.finish_ns


def _node(bank: CostBank, context: int) -> ReferenceNode:
    """Return a node with room for everything, at its first decision."""
    node, requests = new_nodes(1)[0], new_requests(1, 1)[0]
    node["n_models"] = node["n_requests"] = 1
    node["full_verbs"] = 1
    node["horizon_ns"] = node["interval_ns"] = HORIZON_NS
    node["budget_bytes"] = node["host_kv_limit_bytes"] = 2**50
    for field in CONSTANT_FIELDS:
        node[field][0] = bank.constants[field][0]
    node["decode_scale"][0] = node["prefill_scale"][0] = 1.0
    requests["prompt"][0], requests["output"][0] = context, OUTPUT_TOKENS
    requests["ttft_ns"][0] = requests["isolated_ns"][0] = HORIZON_NS
    sim = ReferenceNode(node, requests, bank.decode_tables, bank.prefill_tables)
    sim.advance()
    return sim


def act(sim: ReferenceNode, verb: str) -> None:
    """Apply a verb to the only model of a node, and let time pass to the next decision."""
    sim.act(1 + sim.verbs.index(verb))
    sim.act(WAIT)
