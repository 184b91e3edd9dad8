"""The decision log: every ranking that was answered, in a file that only grows, that shows tampering and that can forget a person.

Knows records as plain JSON data and the people in them; does not know engines, models or what a score means. See `log` for why it is
SQLite and how forgetting and an unbroken chain go together.
"""

from uma_engine.decision_log.log import DecisionLog
from uma_engine.decision_log.parts import FORGOTTEN
from uma_engine.decision_log.types import CONTENTS, Entry, Forgotten, Logged, Verified

__all__ = ["CONTENTS", "FORGOTTEN", "DecisionLog", "Entry", "Forgotten", "Logged", "Verified"]
