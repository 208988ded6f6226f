"""Credit for existing TRL trainers; trl itself is imported when credit is attached to one."""

from attnprobe.rl.trl.attach import CreditHandle, CreditMixin, attach_credit
from attnprobe.rl.trl.callback import CreditCallback

__all__ = ["CreditCallback", "CreditHandle", "CreditMixin", "attach_credit"]
