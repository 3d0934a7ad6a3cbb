"""Hand-written policies: each a class of named parameters with a compiled decision.

``get_rule("slack")`` has the parameters that were found on the training distribution;
``tuned_rule("slack", "h200-24")`` those of one scenario. ``mmrl tune`` finds them.
"""

from mmrl.rules.base import Rule
from mmrl.rules.drain_first import DrainFirst
from mmrl.rules.full_swap import FullSwap
from mmrl.rules.gdsf import Gdsf
from mmrl.rules.idle_cost import IdleCost
from mmrl.rules.lru import Lru
from mmrl.rules.partial import Partial
from mmrl.rules.registry import get_rule, rule_class, rule_names, tuned_rule
from mmrl.rules.setup_index import SetupIndex
from mmrl.rules.slack import Slack
from mmrl.rules.static import Static

__all__ = [
    "DrainFirst",
    "FullSwap",
    "Gdsf",
    "IdleCost",
    "Lru",
    "Partial",
    "Rule",
    "SetupIndex",
    "Slack",
    "Static",
    "get_rule",
    "rule_class",
    "rule_names",
    "tuned_rule",
]
