"""`DeployAdapter`: the one door between a policy and a node, state in, legal action out.

Free of the engine: whoever has a node's arrays can ask here. What a trained policy sees is
computed by the code that training used; it then thinks in a thread of its own, and the node goes on
meanwhile. When it is late, raises, or says something that is not finite or not legal, the champion
decides in its place and a counter tells.
"""

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mmrl.agents.export import ExportedPolicy
from mmrl.deploy.transitions import observe_node
from mmrl.errors import InputError
from mmrl.node.actions import WAIT, verb_count
from mmrl.node.jit import jit
from mmrl.node.observe import observation_size
from mmrl.node.state import CostTable, Nodes, Record
from mmrl.rules import Rule
from mmrl.rules.dispatch import suggest

DEADLINE_S = 0.05
FALLBACKS = ("deadline", "not_finite", "illegal", "error")


@jit
def suggest_for_node(
    number: int,
    nodes: Nodes,
    table: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    params: npt.NDArray[np.float64],
) -> int:
    """Return the action of rule ``number`` for one node."""
    return suggest(number, nodes[0], table[0], decode_tables, prefill_tables, params)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do now.

    Attributes:
        action: A legal action; WAIT for none.
        by: ``policy`` or ``champion``.
        latency_s: From the question to the answer.
    """

    action: int
    by: str
    latency_s: float


@dataclass
class DeployAdapter:
    """Asks a policy for decisions about one node.

    Args:
        policy: A trained policy, or a rule.
        champion: The rule that decides where the policy does not.
        decode_tables: float64[M, 65, 33], seconds, as the node's ``profile`` numbers them.
        prefill_tables: float64[M, 257], seconds.
        deadline_s: Longest time that a policy may think.
        wake: Called when an answer has come, from the policy's thread.

    Attributes:
        reverted: While true, the champion decides.
        fallbacks: How often the champion stood in, by reason (`FALLBACKS`).
    """

    policy: ExportedPolicy | Rule
    champion: Rule
    decode_tables: CostTable
    prefill_tables: CostTable
    deadline_s: float = DEADLINE_S
    wake: Callable[[], None] = lambda: None
    reverted: bool = False
    fallbacks: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "policy")
        self._own_dispatch: int | None = None
        self._answer: Future[int] | None = None
        self._asked_s = 0.0

    @property
    def name(self) -> str:
        """Name of whoever decides now."""
        return self.champion.name if self.reverted else self.policy.name

    def check(self, s: Record) -> None:
        """Refuse a policy that has other verbs than the node.

        Raises:
            InputError: It has.
        """
        if isinstance(self.policy, ExportedPolicy) and not self.policy.plays(bool(s.full_verbs)):
            wanted = "full" if s.full_verbs else "core"
            raise InputError(
                f"policy {self.policy.name} has the verbs '{self.policy.card.verb_set}', "
                f"the node has '{wanted}'",
                "set node.verbs to those of the policy",
            )

    def change(self, policy: ExportedPolicy | Rule, s: Record) -> None:
        """Let another policy decide.

        Raises:
            InputError: It has other verbs than the node; nothing has changed then.
        """
        before, self.policy = self.policy, policy
        try:
            self.check(s)
        except InputError:
            self.policy = before
            raise
        self.reverted = False
        self.prepare(s)

    def prepare(self, s: Record) -> None:
        """Set the dispatch rule that whoever decides was made with, else the node's own."""
        if self._own_dispatch is None:
            self._own_dispatch = int(s.dispatch)
        s.dispatch = self._own_dispatch
        rule = self.policy.rule if isinstance(self.policy, ExportedPolicy) else self.policy
        if self.reverted:
            rule = self.champion
        if rule is not None:
            rule.prepare(s)

    def decide(self, nodes: Nodes, table: Nodes) -> Verdict:
        """Ask and wait for the answer, at most the deadline.

        Args:
            nodes: array[1] of ``NODE``.
            table: array[1, R] of ``REQUEST``.
        """
        self.ask(nodes, table)
        while (verdict := self.poll(nodes, table)) is None:
            if self._answer is not None:
                left = self._asked_s + self.deadline_s - time.monotonic()
                self._wait(max(0.0, left))
        return verdict

    def ask(self, nodes: Nodes, table: Nodes) -> None:
        """Put the question: what to do in this state. The answer comes by `poll`."""
        self._asked_s = time.monotonic()
        self._question: tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]] | None = None
        if self.reverted or isinstance(self.policy, Rule) or self._busy():
            return
        self._question = self._look(nodes, table, self.policy)
        self._answer = self._thread.submit(_think, self.policy, *self._question)
        self._answer.add_done_callback(lambda answer: self.wake())

    def poll(self, nodes: Nodes, table: Nodes) -> Verdict | None:
        """Return the answer to the question, or None while the policy thinks and may.

        Args:
            nodes: The node as it is now: where the champion stands in, it decides on this.
            table: Its requests.
        """
        if self.reverted:
            return self._verdict(self._suggest(self.champion, nodes, table), "champion")
        if isinstance(self.policy, Rule):
            return self._verdict(self._suggest(self.policy, nodes, table), "policy")
        if self._question is None:  # it still thinks about an older question
            return self._fall_back("deadline", nodes, table)
        assert self._answer is not None
        if not self._answer.done():
            if time.monotonic() < self._asked_s + self.deadline_s:
                return None
            return self._fall_back("deadline", nodes, table)
        try:
            action = self._answer.result()
        except FloatingPointError:
            return self._fall_back("not_finite", nodes, table)
        except Exception:  # whatever a policy raises, the node goes on
            return self._fall_back("error", nodes, table)
        mask = self._question[1]
        if not (0 <= action < len(mask) and mask[action]):
            return self._fall_back("illegal", nodes, table)
        return self._verdict(action, "policy")

    def close(self) -> None:
        """Let the thread go; a policy that still thinks is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _busy(self) -> bool:
        return self._answer is not None and not self._answer.done()

    def _wait(self, seconds: float) -> None:
        assert self._answer is not None
        try:
            self._answer.exception(timeout=seconds)
        except TimeoutError:
            return

    def _fall_back(self, why: str, nodes: Nodes, table: Nodes) -> Verdict:
        self.fallbacks[why] += 1
        return self._verdict(self._suggest(self.champion, nodes, table), "champion")

    def _verdict(self, action: int, by: str) -> Verdict:
        return Verdict(action, by, time.monotonic() - self._asked_s)

    def _suggest(self, rule: Rule, nodes: Nodes, table: Nodes) -> int:
        tables = self.decode_tables, self.prefill_tables
        return int(suggest_for_node(rule.number, nodes, table, *tables, rule.params))

    def _look(
        self, nodes: Nodes, table: Nodes, policy: ExportedPolicy
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Return what the policy sees of the node, and the legal actions."""
        models, full_verbs = int(nodes["n_models"][0]), int(nodes["full_verbs"][0])
        size = observation_size(models)
        mask = np.zeros(1 + models * verb_count(full_verbs), np.bool_)
        seen = np.zeros(size + (len(mask) if policy.rule else 0), np.float32)
        observe_node(nodes, table, self.decode_tables, self.prefill_tables, seen[:size], mask)
        if policy.rule is not None:
            seen[size + self._suggest(policy.rule, nodes, table)] = 1.0
        return seen, mask


def _think(
    policy: ExportedPolicy, seen: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_]
) -> int:
    """Return the policy's action.

    Raises:
        FloatingPointError: A score of a legal action is not finite.
    """
    logits = policy.logits(seen)
    if not np.isfinite(logits[mask]).all():
        raise FloatingPointError
    return int(np.where(mask, logits, -np.inf).argmax()) if mask.any() else WAIT
