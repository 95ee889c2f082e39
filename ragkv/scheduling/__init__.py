"""Who runs, who waits and who is preempted: pure Python on an injected clock, so that a simulator drives the same code.

:class:`Scheduler` holds :class:`Ticket`\\ s, ranks them by a policy and answers each step with a :class:`Plan`.
"""

from ragkv.scheduling.accounts import service_bound
from ragkv.scheduling.planning import Plan
from ragkv.scheduling.policies import POLICIES
from ragkv.scheduling.scheduler import Scheduler, SchedulerStats
from ragkv.scheduling.ticket import State, Ticket

__all__ = ["POLICIES", "Plan", "Scheduler", "SchedulerStats", "State", "Ticket", "service_bound"]
