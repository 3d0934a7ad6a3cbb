"""What could be had: policies that try each action on copies of the node before they take one."""

from mmrl.bounds.lookahead import PLANNERS, Lookahead, Planner

__all__ = ["PLANNERS", "Lookahead", "Planner"]
