"""Malformed and unusual inputs at every public entry point: `make fuzz`.

Each argument is replaced, one at a time, by what people type. A wrong value has to be refused by an
`AttnprobeError` with a message; one that means the valid value has to give its very result. Reported are raw
Python errors, wrong values that were accepted, and results that differ. It is not part of `make test`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import warnings
from collections import Counter
from typing import Any

import torch

import attnprobe

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ALLOWED = {
    # Without a model nothing tells that ids are too large.
    ("TokenBatch.of", "value"): {"too large"},
    # Truth values are accepted beside the words.
    ("measure", "receiver"): {"bool 'True'"},
    # Log-probabilities, whose gradients are weighted and whose values are left alone.
    ("gate_gradient", "values"): {"nan", "infinite", "negative"},
    # None is the default.
    ("figures.rhythm", "rhythm"): {"NoneType 'None'"},
    ("figures.tokens", "rhythm"): {"NoneType 'None'"},
    ("load_model", "source"): {"NoneType 'None'"},
    ("RolloutCredit", "advantages"): {"NoneType 'None'"},
    ("HeadStatisticsProbe", "entropy"): {"NoneType 'None'"},
    ("TokenBatch.from_ids start", "response_start"): {"NoneType 'None'"},
    ("TokenBatch.from_text", "responses"): {"NoneType 'None'"},
}
"""Values of a kind that one entry point accepts, where the kind at large refuses them."""


def same(ours: Any, theirs: Any) -> bool:
    """Whether two results are equal, NaN being NaN."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return ours.shape == theirs.shape and torch.equal(ours.nan_to_num(-7.0), theirs.nan_to_num(-7.0))
    if isinstance(ours, tuple | list) and isinstance(theirs, tuple | list):
        return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    if hasattr(ours, "columns") and hasattr(ours, "equals"):
        return bool(ours.equals(theirs))
    return repr(ours) == repr(theirs) and (dataclasses.is_dataclass(ours) or bool(ours == theirs))


def outcome(call: Any, name: str, value: Any) -> tuple[str, Any]:
    """Return "refused", "raw" or "accepted", and the error or the result."""
    try:
        return "accepted", call.function(**{**call.arguments, name: value})
    except attnprobe.AttnprobeError as error:
        return ("refused", str(error)) if len(str(error)) > 15 else ("raw", f"no message: {error!r}")
    except BaseException as error:
        return "raw", f"{type(error).__name__}: {str(error)[:160]}"


def made(makers: Any, valid: Any) -> list[tuple[str, Any]]:
    """Return the values that makers make of a valid one; one that a dtype cannot hold is left out."""
    values = []
    for label, make in makers:
        with contextlib.suppress(OverflowError, TypeError, AttributeError):
            values.append((label, make(valid)))
    return values


def main() -> int:
    """Run all inputs, print what went wrong, and return the exit code."""
    from tests.fuzz.calls import calls
    from tests.fuzz.inputs import KINDS

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    chosen = sys.argv[1:]
    for call in calls():
        if chosen and not any(word in call.name for word in chosen):
            continue
        for name, kind in call.kinds.items():
            valid = call.arguments[name]
            state, expected = outcome(call, name, valid)
            if kind != "path" and state != "accepted" and call.name != "TokenBatch.from_chat":
                counts["broken"] += 1
                print(f"BROKEN {call.name}({name}=valid): {expected}", flush=True)
                continue
            for label, value in made(KINDS[kind].wrong, valid):
                state, what = outcome(call, name, value)
                fine = state == "refused" or label in ALLOWED.get((call.name, name), set())
                counts[f"wrong values: {state}"] += 1
                if not fine:
                    counts["faults"] += 1
                    word = "RAW" if state == "raw" else "WRONG"
                    print(f"{word} {call.name}({name}={label}): {str(what)[:200]}", flush=True)
            for label, value in made(KINDS[kind].equal, valid):
                state, what = outcome(call, name, value)
                equal = state == "accepted" and same(what, expected)
                counts[f"equal values: {'same result' if equal else state}"] += 1
                if not equal:
                    counts["faults"] += 1
                    word = "RAW" if state == "raw" else "DIFFERS" if state == "accepted" else "REFUSED"
                    print(f"{word} {call.name}({name}={label}): {str(what)[:200]}", flush=True)
    print("\n".join(f"{name}: {count}" for name, count in sorted(counts.items())))
    total = sum(count for name, count in counts.items() if "values" in name)
    raw = sum(count for name, count in counts.items() if name.endswith("raw"))
    wrong = counts["faults"] - raw
    print(f"{total} inputs, {raw} raw errors, {wrong} wrong results, {counts['broken']} broken calls")
    return int(counts["faults"] + counts["broken"] > 0)


if __name__ == "__main__":
    sys.exit(main())
