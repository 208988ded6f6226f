"""Loading a model, getting its answer, and measuring it: what `report`, `heads` and `score` begin with.

What is left to others: checking what was asked (options) and showing what was found (commands, shown).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from attnprobe.adapters.base import resolve_layers
from attnprobe.cli.options import Checked
from attnprobe.command_line import shows_progress


@dataclass(frozen=True)
class Reading:
    """A model, its answer, and what its heads did."""

    model: Any
    tokenizer: Any
    name: str
    batch: Any
    statistics: Any
    heads: Any
    answer: str


def read(checked: Checked) -> Reading:
    """Load the model, get an answer, and measure it; its own heads are grouped unless groups were given."""
    import attnprobe
    from attnprobe import models

    asked, progress = checked.asked, shows_progress()
    loaded = models.load_model(asked.model, device=checked.device, dtype=checked.dtype, progress=progress)
    # Report anything wrong with the model or the layers before generating an answer.
    adapter = attnprobe.adapter_for(loaded.model)
    layers = resolve_layers(checked.layers, adapter)
    if checked.groups is not None:
        checked.groups.check_fits(layers, adapter.head_count, adapter.model_name)
    ids = models.prompt_ids(loaded, checked.prompt, system=asked.system, chat=asked.chat)
    if checked.response is None:
        answer = models.generate_response(
            loaded,
            ids,
            max_new_tokens=asked.max_new_tokens,
            temperature=asked.temperature,
            seed=asked.seed,
            progress=progress,
        )
    else:
        answer = list(loaded.tokenizer(checked.response, add_special_tokens=False)["input_ids"])
    batch = attnprobe.TokenBatch.from_ids([ids + answer], response_start=len(ids), tokenizer=loaded.tokenizer)
    statistics = attnprobe.measure(
        loaded.model,
        batch,
        layers=checked.layers,
        window=checked.window,
        horizon=checked.horizon,
        receiver=True,
        progress=progress,
    ).to("cpu")
    heads = checked.groups
    if heads is None:
        heads = attnprobe.classify_heads(statistics, quantile=asked.quantile, span=cast(Any, asked.head_span))
    text = loaded.tokenizer.decode(answer)
    return Reading(loaded.model, loaded.tokenizer, loaded.name, batch, statistics, heads, text)
