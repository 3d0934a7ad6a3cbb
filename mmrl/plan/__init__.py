"""The plan: will a fleet fit, at what rates does it meet its targets, what would a change bring.

`ask` describes fleet and traffic, `plan_site` simulates them at a site (platform, budget, link)
under a policy and under the best hand-written rule, `write_plan` makes the page.
"""

from mmrl.plan.capacity import Answer, Player, plan_site, rule_player
from mmrl.plan.page import check_place, write_plan
from mmrl.plan.question import Question, Site, ask, sites

__all__ = [
    "Answer",
    "Player",
    "Question",
    "Site",
    "ask",
    "check_place",
    "plan_site",
    "rule_player",
    "sites",
    "write_plan",
]
