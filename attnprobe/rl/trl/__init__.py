"""Credit for TRL trainers that already run; trl itself is imported when a trainer is attached to."""

from attnprobe.rl.trl.attach import CreditHandle, CreditMixin, attach_credit
from attnprobe.rl.trl.callback import CreditCallback

__all__ = ["CreditCallback", "CreditHandle", "CreditMixin", "attach_credit"]
