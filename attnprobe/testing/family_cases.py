"""A tiny model of one family with rows of tokens, and the oracle: the maps that eager attention returns.

A `FamilyCase` runs a family's model as users do (padded on either side, around `generate`), and gives what
must come out of it: the metrics of each row's own eager maps, from a second model with the same weights. If
the model itself computes something else in a padded or cached call than for each row on its own, the eager
maps of that very call count. The checks of families make one for each family. What is left to others: the
models (family_models), and what is compared with the oracle (family_checks).
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnprobe import metrics
from attnprobe.errors import AttnprobeError
from attnprobe.head_statistics import HeadStatistics
from attnprobe.testing.family_models import build_family
from attnprobe.testing.family_sizes import VOCABULARY

LENGTHS = (40, 29)
"""The tokens of the two rows, all longer than the windows, blocks and budgets of the models."""
RESPONSE = 9
"""The first response token of each row."""
NEW_TOKENS = 6
SETTINGS: dict[str, Any] = {"window": 4, "horizon": (2, 9)}
"""The settings of every statistic."""
TOLERANCE = 2e-3
"""The largest difference that counts as rounding; a wrong mask or position makes one of 0.05 and more."""

_SINK_AFTER_MAP = ("granite_swa", "granitemoe_swa")
"""Families whose eager attention returns its maps before the sink takes its share of them."""

Call = dict[str, Tensor]
Rows = list[tuple[Tensor, Tensor]]
"""For each row of a call, its tokens and the columns of the call that they are in."""


class ModelFailed(Exception):
    """The model itself, without attnprobe, cannot do what a check asks of it."""


@contextmanager
def without_attnprobe(what: str) -> Iterator[None]:
    """Say that whatever fails in this context is the model's own fault."""
    try:
        yield
    except AttnprobeError:
        raise
    except Exception as error:  # Whatever the family's own classes raise.
        raise ModelFailed(f"{what} fails without attnprobe: {described(error)}") from error


def described(error: Exception) -> str:
    """Return an exception's type, message and place.

    >>> described(ValueError("no"))
    'ValueError: no'
    """
    places = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(places[-1].filename).name}:{places[-1].lineno})" if places else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{place}"


class FamilyCase:
    """A family's model, the same weights with eager attention, and two rows of tokens.

    Attributes:
        name: the family.
        model: its model, with its default attention.
        layers: the layers whose attention is read.
        rows: the tokens of each row.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.model = build_family(name)
        self.layers: tuple[int, ...] = ()
        generator = torch.Generator().manual_seed(1)
        self.rows = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
        self._eager: Any = None
        self._generated: dict[int, Any] = {}
        self._alone: dict[tuple[int, ...], tuple[list[Tensor], Tensor]] = {}

    @property
    def eager(self) -> Any:
        """The same weights with eager attention."""
        if self._eager is None:
            self._eager = build_family(self.name, "eager")
            self._eager.load_state_dict(self.model.state_dict())
        return self._eager

    @property
    def arguments(self) -> frozenset[str]:
        """The names of the arguments that the model's forward takes."""
        return frozenset(inspect.signature(type(self.model).forward).parameters)

    @property
    def skips_rows(self) -> bool:
        """Whether the model computes the last layers for the last token only, where it needs no more."""
        config = self.model.config.get_text_config(decoder=True)
        return bool(getattr(config, "num_kv_shared_layers", 0))

    # ---- calls ----------------------------------------------------------------------------------

    def call(self, side: str) -> Call:
        """Return the arguments of a call of both rows, padded on a side, as a careful user passes them.

        Without padding ("none"), both rows have the length of the shorter one.
        """
        width = min(LENGTHS) if side == "none" else max(LENGTHS)
        ids = torch.zeros(len(self.rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(self.rows):
            length = min(len(row), width)
            start = width - length if side == "left" else 0
            ids[index, start : start + length] = row[:length]
            mask[index, start : start + length] = 1
        return self._whole_call(ids, mask)

    def _whole_call(self, ids: Tensor, mask: Tensor | None = None) -> Call:
        mask = torch.ones_like(ids) if mask is None else mask
        call = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in self.arguments:
            call["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return call

    def prompt(self, *, padded: bool) -> Call:
        """Return the arguments of `generate`: both rows with padding on the left, or one row without."""
        call = self.call("left") if padded else {name: value[:1] for name, value in self.call("none").items()}
        return {name: call[name] for name in ("input_ids", "attention_mask")}

    @staticmethod
    def rows_of(call: Call) -> tuple[Rows, Tensor]:
        """Return the rows of a call, and its response mask."""
        mask = call["attention_mask"].bool()
        rows = []
        for ids, real in zip(call["input_ids"], mask, strict=True):
            columns = real.nonzero()[:, 0]
            rows.append((ids[columns], columns))
        return rows, mask & (mask.cumsum(-1) > RESPONSE)

    @torch.no_grad()
    def run(self, call: Call, model: Any = None, **more: Any) -> Any:
        """Return the model's output for a call."""
        return (self.model if model is None else model)(**call, **more)

    @torch.no_grad()
    def generate(self, call: Call, model: Any = None, **more: Any) -> Any:
        """Return a few greedily generated tokens, with the logits that they were chosen by."""
        return (self.model if model is None else model).generate(
            **call,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **more,
        )

    def generated(self, prompt: Call) -> Any:
        """Return what the model generates without attnprobe."""
        rows = len(prompt["input_ids"])
        if rows not in self._generated:
            with without_attnprobe("generate"):
                self._generated[rows] = self.generate(prompt)
        return self._generated[rows]

    def whole(self, prompt: Call, sequences: Tensor) -> Call:
        """Return the call of a prompt with what was generated; the last token is never run."""
        ids = sequences[:, :-1]
        generated = torch.ones_like(ids[:, prompt["input_ids"].shape[1] :])
        return self._whole_call(ids, torch.cat([prompt["attention_mask"], generated], dim=-1))

    # ---- the oracle -----------------------------------------------------------------------------

    def alone(self, ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the eager maps of a row on its own, `[1, head, token, token]` by layer, and its logits."""
        key = tuple(ids.tolist())
        if key not in self._alone:
            maps, logits = self._maps(self._whole_call(ids[None]))
            self._alone[key] = maps, logits[0]
        return self._alone[key]

    def in_call(self, call: Call, columns: Tensor, row: int) -> list[Tensor]:
        """Return the eager maps of a row in a call of several."""
        return [pattern[row : row + 1, :, columns][..., columns] for pattern in self._maps(call)[0]]

    def while_generating(self, prompt: Call, columns: Tensor, row: int) -> list[Tensor]:
        """Return the eager maps of a row of a generated batch, put together from those of all its steps."""
        with without_attnprobe("generate under eager attention"):
            steps = self.generate(prompt, self.eager, output_attentions=True).attentions
        length = prompt["input_ids"].shape[1] + NEW_TOKENS - 1
        maps = []
        for of_layer in zip(*(self._of_layers(step) for step in steps), strict=True):
            whole = of_layer[0].new_zeros(of_layer[0].shape[1], length, length)
            end = 0
            for pattern in of_layer:
                queries, keys = pattern.shape[2:]
                end += queries
                # A sliding cache has dropped the first keys, one of fixed size has room for later ones.
                known = min(keys, end)
                whole[:, end - queries : end, end - known : end] = pattern[row, :, :, :known]
            maps.append(whole[:, columns][..., columns][None])
        return maps

    def _maps(self, call: Call) -> tuple[list[Tensor], Tensor]:
        products: dict[int, list[Tensor]] = {}
        with without_attnprobe("eager attention"), self._products(products):
            output = self.run(call, self.eager, output_attentions=True)
        maps = self._of_layers(output.attentions)
        for layer, (values, scaled) in products.items():
            maps[layer] = maps[layer] * _scale_of_rows(maps[layer], values, scaled)
        return maps, output.logits

    def _of_layers(self, given: Any) -> list[Tensor]:
        """Return those of a model's maps that belong to the layers whose attention is read."""
        given = list(given or ())
        found = [pattern for pattern in given if isinstance(pattern, Tensor) and pattern.ndim == 4]
        if len(given) > len(self.layers) and len(given) > max(self.layers):
            found = [given[layer] for layer in self.layers]
        if len(found) != len(self.layers) or not all(isinstance(pattern, Tensor) for pattern in found):
            raise ModelFailed(f"eager attention returns {len(found)} maps for {len(self.layers)} layers")
        return found

    @contextmanager
    def _products(self, products: dict[int, list[Tensor]]) -> Iterator[None]:
        """Keep each layer's values, and the attention output that comes of them, where maps lack a factor."""
        handles = []
        if self.name in _SINK_AFTER_MAP:
            for number, layer in enumerate(self.eager.model.layers):
                kept = products.setdefault(number, [])
                attention = layer.self_attn
                handles += [
                    attention.v_proj.register_forward_hook(
                        lambda m, a, output, kept=kept: kept.append(output)
                    ),
                    attention.o_proj.register_forward_pre_hook(
                        lambda m, args, kept=kept: kept.append(args[0])
                    ),
                ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ---- comparing ------------------------------------------------------------------------------

    def difference(
        self, found: HeadStatistics, row: int, columns: Tensor, maps: list[Tensor], *, partly: bool = False
    ) -> float:
        """Return the largest difference between a row's statistics and the metrics of its maps.

        With `partly`, the statistics may be undefined where the maps are not.
        """
        response = torch.arange(len(columns))[None] >= RESPONSE
        worst = 0.0
        for index, pattern in enumerate(maps):
            pattern = pattern.float()
            try:
                expected = {
                    "span": metrics.mean_attention_distance(pattern, response),
                    "waad": metrics.windowed_attention_distance(pattern, response, SETTINGS["window"]),
                    "fai": metrics.future_attention_influence(pattern, response, SETTINGS["horizon"]),
                    "receiver_kurtosis": metrics.receiver_kurtosis(pattern, response),
                }
            except AttnprobeError as error:
                raise ModelFailed(f"eager maps of {list(pattern.shape)} have no metrics: {error}") from error
            for name, value in expected.items():
                measured = getattr(found, name)[row, index, : pattern.shape[1]]
                measured = measured[:, columns] if name in ("waad", "fai") else measured
                if partly:
                    # Rows that the model did not compute are undefined, and so is what needs them.
                    value = value.masked_fill(measured.isnan(), torch.nan)
                worst = max(worst, gap(measured, value[0]))
        return worst


def gap(first: Tensor, second: Tensor) -> float:
    """Return the largest difference, relative to numbers above 1; infinity for other shapes or NaNs.

    >>> gap(torch.tensor([1.0, 200.0]), torch.tensor([1.0, 100.0]))
    1.0
    """
    if first.shape != second.shape or not torch.equal(first.isnan(), second.isnan()):
        return float("inf")
    if second.numel() == 0:
        return 0.0
    first, second = first.nan_to_num(), second.nan_to_num()
    return float((first - second).abs().max()) / max(1.0, float(second.abs().max()))


def _scale_of_rows(pattern: Tensor, values: Tensor, scaled: Tensor) -> Tensor:
    """Return by how much the output of each row was scaled after its map: `[batch, head, query, 1]`."""
    width = scaled.shape[-1] // pattern.shape[1]
    values = values.unflatten(-1, (-1, width)).transpose(1, 2)
    values = values.repeat_interleave(pattern.shape[1] // values.shape[1], dim=1)
    product = pattern @ values
    scaled = scaled.unflatten(-1, (-1, width)).transpose(1, 2)
    return (product * scaled).sum(-1, keepdim=True) / (product * product).sum(-1, keepdim=True)
