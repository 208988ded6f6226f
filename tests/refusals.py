"""What tests of refusals share: an error of ours is raised, and its message tells the facts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from attnprobe import AttnprobeError


def refused(call: Callable[[], Any], *facts: object, error: type[AttnprobeError] = AttnprobeError) -> str:
    """Check that a call raises such an error, whose message holds the facts: names, shapes, values.

    Not the wording, which may change.
    """
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    missing = [fact for fact in facts if str(fact) not in message]
    assert not missing, f"{missing} not in {message!r}"
    assert len(message) > 15
    return message
