"""What is computed next: requests in, steps out, results back in.

Knows requests, budgets and blocks; does not know tensors, models or text. Imports no torch.
"""

from uma_engine.scheduler.events import Counters, Event, Finished, ScoreReady, TokenReady
from uma_engine.scheduler.scheduler import Scheduler

__all__ = ["Counters", "Event", "Finished", "Scheduler", "ScoreReady", "TokenReady"]
