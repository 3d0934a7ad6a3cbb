"""The study: offloading and preemption of each model on each platform, worked out from profiles.

``compute`` makes the tables, ``write_study`` the page about them and the tables as files. Every
second comes from ``CostModel`` and from the semantics of a node (docs/semantics.md).
"""

from mmrl.study.page import check_place, write_study
from mmrl.study.tables import Study, compute, gather

__all__ = ["Study", "check_place", "compute", "gather", "write_study"]
