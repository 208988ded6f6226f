"""Probes, and `attach`: looking into a model's own forward pass, with a check that nothing is missed.

A probe names the sites it wants, is shown their values, and may put another tensor in a site's place.
`attach` connects probes to a model through its adapter while a `with` block is open, around whatever the
user runs inside. After every forward pass it checks that each layer was seen exactly once: a hook that
never fires, or fires twice, would otherwise silently give a wrong number. Users call `attach`, and so does
`measure`. What is left to others: how sites are read (adapters), and the probes that compute something
(head_statistics).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnprobe.adapters import LAYER_SITES, SITES, Adapter, adapter_for
from attnprobe.adapters.base import GrowingCache, Layers, Value, resolve_layers
from attnprobe.attention.checks import judge_later
from attnprobe.batch import TokenBatch
from attnprobe.errors import IncompleteRunError, InterventionError, ParameterError, UnsupportedModelError
from attnprobe.segments import check_own_names, segment_names
from attnprobe.validation import ArrayLike, as_mask, brief
from attnprobe.with_block import WithBlock


class Probe:
    """Something that looks at sites of a forward pass. Subclass it and override `observe`.

    >>> class CountHeads(Probe):
    ...     sites = frozenset({"attention"})
    ...     heads = 0
    ...     def observe(self, site, layer, value, batch):
    ...         self.heads += value.head_count

    >>> class WithoutFeedForward(Probe):
    ...     sites = frozenset({"mlp_output"})
    ...     def observe(self, site, layer, value, batch):
    ...         return torch.zeros_like(value)
    """

    sites: frozenset[str] = frozenset({"attention"})
    """The sites that the probe needs: it is an error if the model has no such site, or does not show it."""

    optional_sites: frozenset[str] = frozenset()
    """Further sites, which the probe looks at if they are there."""

    def follow(self, cache: GrowingCache | None) -> None:
        """Learn which KV cache the pass that is about to begin adds to; None without one."""

    def begin(self, batch: TokenBatch) -> None:
        """Prepare for a forward pass over these tokens, which is about to start."""

    def observe(self, site: str, layer: int | None, value: Value, batch: TokenBatch) -> Tensor | None:
        """Look at the value at a site: an `Attention` for "attention", else a tensor.

        A returned tensor replaces the site's, in the model and for the probes after this one; it must have
        the same shape, dtype and device, and be finite. The tensor that is shown may be kept; changing it
        in place is an error, since it would have no effect. Checks of what is shown are judged when the pass
        ends: use it for nothing lasting before `end` is called.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override observe")

    def end(self, batch: TokenBatch) -> None:
        """Use what was seen: the forward pass is complete and was checked; every layer was seen once."""

    def abort(self) -> None:
        """Forget what was seen: the forward pass has failed."""


@dataclass(frozen=True)
class Attachment:
    """What `with attach(...) as attached` gives: which layers are observed, and through which adapter."""

    adapter: Adapter
    layers: tuple[int, ...]

    @property
    def skipped_layers(self) -> tuple[int, ...]:
        """The model's layers without attention."""
        return self.adapter.skipped_layers


def attach(
    model: Any,
    *probes: Probe,
    layers: Layers = "all",
    response_mask: ArrayLike | None = None,
    attention_mask: ArrayLike | None = None,
    segments: Mapping[str, ArrayLike] | None = None,
) -> WithBlock[Attachment]:
    """Show the forward passes of a model to probes while a `with` block is open.

    Args:
        model: a model that an adapter knows.
        probes: one or more probes, in the order in which they are shown a site.
        layers: "all", "middle" (five, evenly spaced in the middle third), another name of `named_layers`, or
            layer numbers.
        response_mask: `[batch, token]`, True (or 1) for those tokens passed to the model that are response;
            default: all that are not padding. In `generate`, give the prompt's mask; tokens after it count as
            response. With a KV cache it may cover more than the first pass.
        attention_mask: `[batch, token]`, True (or 1) for the tokens that are no padding, where the model is
            not told: on the right a causal model needs no mask, but padding would count as prompt. Default:
                the
            mask that the model is given.
        segments: masks `[batch, token]` of named segments, shaped like `response_mask`, for probes that are
            asked about them; tokens after a mask are in no segment.

    Raises:
        ParameterError: no probe, something that is not a probe, an unknown site, a mask with other values,
            or layers that the model does not have.
        BatchError: segments with a built-in name.
        UnsupportedModelError: a model whose attention cannot be read, or a site whose usual meaning this
            family's modules cannot give.
        IncompleteRunError: in a forward pass, some layer was not seen exactly once, or no logits were seen.
        InterventionError: in a forward pass, a probe returned something that cannot replace a tensor.

    The model's own outputs change only where a probe replaces something, and however the block ends, the
    model is left as it was. Arguments are checked when `attach` is called; nothing is attached before the
    block opens.

    >>> from attnprobe.testing.tiny_models import tiny_model
    >>> class CountHeads(Probe):
    ...     heads = 0
    ...     def observe(self, site, layer, value, batch):
    ...         self.heads += value.head_count
    >>> model, probe = tiny_model("llama"), CountHeads()
    >>> with attach(model, probe, layers=[0, 2]):
    ...     output = model(torch.tensor([[1, 2, 3]]))
    >>> probe.heads
    8
    """
    sites, optional = _sites_of(probes, "sites"), _sites_of(probes, "optional_sites")
    unknown = (sites | optional) - set(SITES)
    if unknown:
        raise ParameterError(f"unknown sites {sorted(unknown)}; the sites are {', '.join(SITES)}")
    adapter = adapter_for(model)
    for site in sorted(sites & set(adapter.refused_sites)):
        raise UnsupportedModelError(f"there is no site {site} here: {adapter.refused_sites[site]}")
    chosen = resolve_layers(layers, adapter)
    masks = {} if response_mask is None else {_RESPONSE: _mask_of(response_mask, "response_mask")}
    if attention_mask is not None:
        masks[_REAL] = _mask_of(attention_mask, "attention_mask")
    masks |= _segments_of(segments)
    shown = sites | (optional - set(adapter.refused_sites))
    return WithBlock("attach", _attached(_Run(adapter, probes, chosen, sites, masks), sorted(shown)))


@contextmanager
def _attached(run: _Run, sites: Sequence[str]) -> Iterator[Attachment]:
    with run.adapter.observed(run, sites, run.layers):
        yield Attachment(run.adapter, run.layers)


def _sites_of(probes: Sequence[Any], attribute: str) -> set[str]:
    """Return the sites that probes name in an attribute, or raise an error that names what is not a probe."""
    if not probes:
        raise ParameterError("attach needs at least one probe")
    for probe in probes:
        if isinstance(probe, type):
            raise ParameterError(
                f"{probe.__name__} is a class: attach an instance of it, {probe.__name__}(...)"
            )
        if isinstance(probe, list | tuple | set | dict):
            raise ParameterError(
                f"attach takes probes one by one, attach(model, first, second), not a {type(probe).__name__} "
                "of them"
            )
        methods = ("begin", "observe", "end", "abort")
        missing = [name for name in methods if not callable(getattr(probe, name, None))]
        if missing or not hasattr(probe, "sites"):
            raise ParameterError(
                f"attach needs probes, instances of subclasses of attnprobe.Probe; got {brief(probe)}, a "
                f"{type(probe).__name__}, which has no {(missing or ['sites'])[0]}"
            )
        sites: Any = getattr(probe, attribute, frozenset())
        if isinstance(sites, str) or not isinstance(sites, Iterable):
            raise ParameterError(
                f"the {attribute} of {type(probe).__name__} must be a set of names, as in "
                f"frozenset({{'attention'}}); got {brief(sites)}"
            )
    return {site for probe in probes for site in getattr(probe, attribute, frozenset())}


# The names of the response and of what is no padding among masks: no segment is called so.
_RESPONSE, _REAL = "", "\0"


def _mask_of(given: ArrayLike, name: str) -> Tensor:
    """Return a mask as a boolean tensor `[batch, token]`."""
    mask = as_mask(given, name)
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.ndim != 2:
        raise ParameterError(f"{name} must be [batch, token], got {list(mask.shape)}")
    return mask


def _segments_of(segments: Mapping[str, ArrayLike] | None) -> dict[str, Tensor]:
    """Return the masks of named segments."""
    if segments is None:
        return {}
    if not isinstance(segments, Mapping):
        raise ParameterError(f"segments must be a dictionary of masks by name; got {brief(segments)}")
    check_own_names(segment_names(list(segments), "segments"))
    return {name: _mask_of(mask, f"the segment {name!r}") for name, mask in segments.items()}


class _Run:
    """The observer behind `attach`: passes values on to the probes and counts them."""

    def __init__(
        self,
        adapter: Adapter,
        probes: Sequence[Probe],
        layers: tuple[int, ...],
        sites: set[str],
        masks: dict[str, Tensor],
    ) -> None:
        self.adapter = adapter
        self.layers = layers
        self._probes = probes
        self._sites = [site for site in LAYER_SITES if site in sites]
        self._needs_logits = "logits" in sites
        # The response mask, if there is one, and those of segments.
        self._masks = masks
        self._repeats = 1
        self._first_ids: Tensor | None = None
        self._seen: Counter[tuple[str, int | None]] = Counter()
        self._skipped: set[str] = set()
        self._batch: TokenBatch | None = None

    def begin(self, batch: TokenBatch, cached: int, cache: GrowingCache | None = None) -> None:
        if self._masks:
            marked = {name: self._marked(name, batch, cached, cache) for name in self._masks}
            real = marked.pop(_REAL, batch.attention_mask)
            response = marked.pop(_RESPONSE, batch.response_mask) & real
            segments = torch.stack(list(marked.values()), dim=1) & real[:, None] if marked else None
            batch = TokenBatch.of_pass(
                batch.input_ids, real, response, batch.segment_ids, segments, tuple(marked)
            )
        self._batch = batch
        self._seen.clear()
        self._skipped.clear()
        for probe in self._probes:
            # Probes need not be subclasses of Probe.
            if hasattr(probe, "follow"):
                probe.follow(cache)
            probe.begin(batch)

    def _marked(self, name: str, batch: TokenBatch, cached: int, cache: GrowingCache | None) -> Tensor:
        """Return which tokens of a pass a mask marks; tokens after it are response, and in no segment."""
        given = self._masks[name]
        examples, tokens = batch.input_ids.shape
        if cached == 0:
            self._repeats = self._repeats_in(batch)
        mask = given.repeat_interleave(self._repeats, dim=0)
        width = mask.shape[1]
        # Assisted decoding runs the prompt with its first guesses. With a cache, a prompt may come in parts.
        fits = width == tokens or (cache is not None and (width > tokens or width == tokens - cache.drafted))
        fits = fits or cached > 0 or self._has_grown(batch, width)
        if mask.shape[0] != examples or not fits:
            raise ParameterError(
                f"{_named(name)} is {list(given.shape)}, but the model was given tokens "
                f"{list(batch.input_ids.shape)}"
            )
        if width == tokens and cached == 0:
            self._first_ids = batch.input_ids
        mask = mask.to(batch.input_ids.device)[:, cached : cached + tokens]
        mask = torch.nn.functional.pad(mask, (0, tokens - mask.shape[1]), value=name in (_RESPONSE, _REAL))
        return mask & batch.attention_mask

    def skip(self, site: str) -> None:
        self._skipped.add(site)

    def _repeats_in(self, batch: TokenBatch) -> int:
        """Return how often each example of the mask is repeated, as for several continuations of a prompt."""
        repeats, rest = divmod(batch.batch_size, len(next(iter(self._masks.values()))))
        if rest or repeats < 2:
            return 1
        # Examples that differ are other examples than those that were marked.
        for values in (batch.input_ids, batch.attention_mask):
            if not torch.equal(values, values[::repeats].repeat_interleave(repeats, dim=0)):
                return 1
        return repeats

    def _has_grown(self, batch: TokenBatch, width: int) -> bool:
        """Whether a pass runs the first one's tokens again, and more, as generation without a cache does."""
        first, ids = self._first_ids, batch.input_ids
        return (
            first is not None
            and ids.shape[1] > width == first.shape[1]
            and torch.equal(ids[:, :width].to(first.device), first)
        )

    def observe(self, site: str, layer: int | None, value: Value) -> Tensor | None:
        assert self._batch is not None
        self._seen[site, layer] += 1
        replaced: Tensor | None = None
        for probe in self._probes:
            if site in probe.sites or site in getattr(probe, "optional_sites", ()):
                given = probe.observe(site, layer, value, self._batch)
                if given is not None:
                    _check_replacement(probe, site, value, given)
                    value = replaced = given
        return replaced

    def end(self) -> None:
        assert self._batch is not None
        batch, self._batch = self._batch, None
        try:
            self._check_complete()
        except IncompleteRunError:
            self.abort()
            raise
        for probe in self._probes:
            probe.end(batch)

    def abort(self) -> None:
        self._batch = None
        for probe in self._probes:
            probe.abort()

    def _check_complete(self) -> None:
        problems = []
        for site in self._sites:
            at = "" if site == "attention" else f" at {site}"
            silent = [layer for layer in self.layers if self._seen[site, layer] == 0]
            repeated = [layer for layer in self.layers if self._seen[site, layer] > 1]
            if silent and max(silent) == max(self.layers) and len(silent) < len(self.layers):
                at += " (did the pass leave the model early, as with assistant_early_exit?)"
            problems += [f"layers {silent} were silent{at}"] if silent else []
            problems += [f"layers {repeated} were seen more than once{at}"] if repeated else []
        if problems:
            raise IncompleteRunError(
                f"{' and '.join(problems)} in a forward pass of {self.adapter.full_name} through "
                f"{self.adapter.backend}; each layer must be seen exactly once, so this pass was discarded"
            )
        if self._needs_logits and "logits" not in self._skipped and self._seen["logits", None] == 0:
            raise IncompleteRunError(
                f"a forward pass of {self.adapter.full_name} showed no logits, which a probe needs, and was "
                "discarded: call the whole model, not its forward or the base model inside it, and without "
                "options that leave logits out"
            )


def _named(mask: str) -> str:
    known = {_RESPONSE: "response_mask", _REAL: "attention_mask"}
    return known.get(mask, f"the segment {mask!r}")


def _check_replacement(probe: Probe, site: str, value: Value, given: Any) -> None:
    """Check that what a probe returned can replace a site's tensor."""
    who = f"{type(probe).__name__} returned"
    if not isinstance(value, Tensor) or site == "value_norms":
        raise InterventionError(
            f"{who} something for {site}, which can be read but not replaced: use suppress_attention"
        )
    if not isinstance(given, Tensor):
        raise InterventionError(
            f"{who} a {type(given).__name__} for {site}: return a tensor to replace it, or else None"
        )
    for name in ("shape", "dtype", "device"):
        if getattr(given, name) != getattr(value, name):
            found, expected = getattr(given, name), getattr(value, name)
            if name == "shape":
                found, expected = list(found), list(expected)
            raise InterventionError(f"{who} {name} {found} for {site}, which has {name} {expected}")

    def judge(finite: list[float]) -> None:
        if not finite[0]:
            raise InterventionError(f"{who} NaN or infinity for {site}")

    judge_later([torch.isfinite(given.detach()).all()], judge)
