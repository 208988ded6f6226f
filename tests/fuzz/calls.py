"""The public entry points, each with valid arguments and the kind of every argument."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import attnprobe
from attnprobe import metrics
from attnprobe.analysis.forced_tokens import force_tokens
from attnprobe.models import generate_response, load_model, prompt_ids
from attnprobe.rhythm import dominated_anchors, find_peaks, top_quantile, waad_change
from attnprobe.rl import (
    CoupledRhythmCredit,
    EntropyCredit,
    GlobalAnchorCredit,
    LocalChunkCredit,
    PPOConfig,
    RandomCredit,
    Rollout,
    RolloutCredit,
    apply_credit,
    credit_weights,
    decay,
    gate_gradient,
    honours_weights,
    measure_rollout,
    score_rollout,
    warmup,
)
from attnprobe.testing.tiny_models import tiny_model, tiny_tokenizer


@dataclass(frozen=True)
class Call:
    """An entry point with valid arguments, by name, and the kinds of those that are varied."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    kinds: dict[str, str]


def entered(context: Any, run: Callable[[], Any]) -> Any:
    """Return what a call gives inside a context."""
    with context, torch.no_grad():
        return run()


def calls() -> list[Call]:
    """Return all entry points, with a tiny model, batch and results that are made once."""
    torch.manual_seed(0)
    model, tokenizer = tiny_model("llama", vocab_size=300), tiny_tokenizer()
    ids = torch.randint(1, 290, (3, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 24, dtype=torch.bool)
    mask[1, 20:] = False
    batch = attnprobe.TokenBatch.from_ids(ids, mask, response_start=6, tokenizer=tokenizer)
    response = batch.response_mask
    horizon = (2, 8)
    stats = attnprobe.measure(model, batch, horizon=horizon, receiver=True)
    heads = attnprobe.classify_heads(stats)
    scores = attnprobe.score_tokens(stats, heads)
    rhythm = attnprobe.find_rhythm(scores)
    pattern = torch.rand(1, 2, 12, 12, generator=torch.Generator().manual_seed(1)).tril()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    rows = torch.ones(1, 12, dtype=torch.bool)
    rows[0, :3] = False
    folder = Path(tempfile.mkdtemp())
    saved = {
        name: result.save(folder / f"{name}.safetensors")
        for name, result in {
            "stats": stats,
            "heads": heads,
            "scores": scores,
            "rhythm": rhythm,
            "batch": batch,
        }.items()
    }
    rollout = {
        "prompt_ids": ids[:, :6],
        "prompt_mask": mask[:, :6],
        "completion_ids": ids[:, 6:],
        "completion_mask": mask[:, 6:],
    }
    rollout_kinds = {
        "prompt_ids": "ids",
        "prompt_mask": "mask",
        "completion_ids": "ids",
        "completion_mask": "mask",
    }
    credit = {
        "advantages": torch.tensor([1.0, -1.0]),
        "gamma": torch.full((2, 3), 1.5),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "signs": "both",
    }
    credit_kinds = {"advantages": "advantages", "gamma": "weights", "mask": "mask", "signs": "word"}
    positions = torch.arange(24).expand(3, 24)
    pairs = [(0, 1), (2, 3), (1, 0)]

    def logits() -> Any:
        return model(ids).logits

    def reinforced(log_probs: Any, old_log_probs: Any, advantages: Any, mask: Any) -> Any:
        return -(log_probs * advantages * mask).mean()

    def suppressing(**options: Any) -> Any:
        return entered(attnprobe.suppress_attention(model, **options), logits)

    def attaching(probe: Any, **options: Any) -> Any:
        if isinstance(probe, attnprobe.HeadStatisticsProbe):
            probe.reset()
        entered(attnprobe.attach(model, probe, **options), logits)
        return probe.result()

    found = [
        # batches
        Call("TokenBatch.of", attnprobe.TokenBatch.of, {"value": batch}, {"value": "batch"}),
        Call(
            "TokenBatch.from_ids",
            attnprobe.TokenBatch.from_ids,
            {"input_ids": ids, "attention_mask": mask, "response_mask": response},
            {"input_ids": "ids", "attention_mask": "mask", "response_mask": "mask"},
        ),
        Call(
            "TokenBatch.from_ids start",
            attnprobe.TokenBatch.from_ids,
            {"input_ids": ids, "response_start": 6},
            {"response_start": "distance"},
        ),
        Call(
            "TokenBatch",
            attnprobe.TokenBatch,
            {"input_ids": ids, "attention_mask": mask, "response_mask": response},
            {"input_ids": "result", "attention_mask": "result", "response_mask": "result"},
        ),
        Call(
            "TokenBatch.from_text",
            attnprobe.TokenBatch.from_text,
            {"tokenizer": tokenizer, "prompts": ["abc"], "responses": ["Read what"]},
            {"tokenizer": "tokenizer", "prompts": "texts", "responses": "texts"},
        ),
        Call(
            "TokenBatch.from_chat",
            attnprobe.TokenBatch.from_chat,
            {"tokenizer": tokenizer, "messages": [{"role": "user", "content": "abc"}], "responses": ["Read"]},
            {"tokenizer": "tokenizer", "messages": "texts", "responses": "texts"},
        ),
        Call("TokenBatch.from_rollout", attnprobe.TokenBatch.from_rollout, rollout, rollout_kinds),
        # measuring
        Call(
            "measure",
            attnprobe.measure,
            {
                "model": model,
                "batch": batch,
                "layers": [0, 1],
                "window": 4,
                "horizon": horizon,
                "span": True,
                "entropy": True,
                "receiver": "token",
                "share_on": ["first", "prompt"],
                "share_from": ["response"],
                "span_ignores": ["first"],
                "influence_rows": "response",
                "value_weighted": False,
                "batch_size": 2,
                "memory_budget": 10**6,
                "token_budget": 64,
                "progress": False,
            },
            {
                "model": "model",
                "batch": "batch",
                "layers": "layers",
                "window": "count",
                "horizon": "horizon",
                "span": "switch",
                "entropy": "switch",
                "receiver": "word",
                "share_on": "names",
                "share_from": "names",
                "span_ignores": "names",
                "influence_rows": "word",
                "value_weighted": "switch",
                "batch_size": "optional count",
                "memory_budget": "count",
                "token_budget": "optional count",
                "progress": "switch",
            },
        ),
        Call(
            "attach",
            attaching,
            {
                "probe": attnprobe.HeadStatisticsProbe(horizon=horizon),
                "layers": [0, 1],
                "response_mask": response,
            },
            {"probe": "probe", "layers": "layers", "response_mask": "mask"},
        ),
        Call(
            "HeadStatisticsProbe",
            lambda **options: vars(attnprobe.HeadStatisticsProbe(**options))["window"],
            {"window": 3, "horizon": horizon, "span": True, "receiver": False, "entropy": True},
            {
                "window": "count",
                "horizon": "horizon",
                "span": "switch",
                "receiver": "switch",
                "entropy": "switch",
            },
        ),
        Call("suppress_attention heads", suppressing, {"heads": pairs}, {"heads": "heads"}),
        Call(
            "suppress_attention keys",
            suppressing,
            {"layers": [0, 1], "keys": [3, 9, 11], "queries": [10, 12, 20]},
            {"layers": "layers", "keys": "columns", "queries": "columns"},
        ),
        Call(
            "suppress_attention pairs", suppressing, {"pairs": [(5, 3), (9, 2), (7, 7)]}, {"pairs": "pairs"}
        ),
        Call(
            "group_maps",
            attnprobe.group_maps,
            {"model": model, "batch": batch, "heads": heads, "example": 1, "token_budget": 4096},
            {"model": "model", "batch": "batch", "example": "indices", "token_budget": "optional count"},
        ),
        Call(
            "group_maps own",
            attnprobe.group_maps,
            {"model": model, "batch": batch, "local_heads": pairs, "global_heads": pairs},
            {"local_heads": "heads", "global_heads": "heads"},
        ),
        # heads, scores, rhythm
        Call(
            "classify_heads",
            attnprobe.classify_heads,
            {"statistics": stats, "quantile": 0.3, "receivers": 3},
            {"statistics": "result", "quantile": "share", "receivers": "count"},
        ),
        Call(
            "score_tokens",
            attnprobe.score_tokens,
            {"statistics": stats, "heads": heads},
            {"statistics": "result"},
        ),
        Call(
            "score_tokens own",
            attnprobe.score_tokens,
            {"statistics": stats, "local_heads": pairs, "global_heads": pairs, "align": "token"},
            {"local_heads": "heads", "global_heads": "heads", "align": "word"},
        ),
        Call(
            "find_rhythm",
            attnprobe.find_rhythm,
            {"scores": scores, "quantile": 0.4, "lookback": 2},
            {"scores": "result", "quantile": "share", "lookback": "count"},
        ),
        Call(
            "find_peaks",
            find_peaks,
            {"values": scores.waad, "quantile": 0.4},
            {"values": "values", "quantile": "share"},
        ),
        Call(
            "top_quantile",
            top_quantile,
            {"values": scores.waad, "quantile": 0.4},
            {"values": "values", "quantile": "share"},
        ),
        Call("waad_change", waad_change, {"waad": scores.waad}, {"waad": "values"}),
        Call(
            "dominated_anchors",
            dominated_anchors,
            {"anchor": rhythm.anchor, "waad": scores.waad, "lookback": 2},
            {"anchor": "mask", "waad": "values", "lookback": "count"},
        ),
        Call("HeadStatistics.at_layers", stats.at_layers, {"layers": [0, 1]}, {"layers": "layers"}),
        Call("HeadGroups[]", heads.__getitem__, {"group": "local"}, {"group": "word"}),
        Call("HeadGroups.pairs", heads.pairs, {"group": "global"}, {"group": "word"}),
        Call("HeadGroups.mask", heads.mask, {"group": "local"}, {"group": "word"}),
        Call("Rhythm.pairs", rhythm.pairs, {"example": 1}, {"example": "index"}),
        Call("to_pandas", stats.to_pandas, {"per": "token"}, {"per": "word"}),
        Call("sentence_ids", attnprobe.sentence_ids, {"batch": batch}, {"batch": "result"}),
        Call(
            "Report",
            lambda **parts: attnprobe.Report(**parts).html()[:100],
            {
                "batch": batch,
                "statistics": stats,
                "heads": heads,
                "scores": scores,
                "rhythm": rhythm,
                "example": 1,
            },
            {
                "statistics": "result",
                "heads": "result",
                "scores": "result",
                "rhythm": "result",
                "example": "index",
            },
        ),
        Call(
            "Report weights",
            lambda weights: attnprobe.Report(
                batch, stats, heads, scores, rhythm, weights={"coupled": weights}
            ).weights["coupled"],
            {"weights": torch.full(tuple(batch.input_ids.shape), 1.5)},
            {"weights": "weights"},
        ),
        # analysis
        Call(
            "couplings",
            attnprobe.couplings,
            {
                "measured": scores,
                "align": "token",
                "quantile": 0.4,
                "lookback": 2,
                "peaks": "maxima",
                "null": "position",
                "clusters": [0, 1, 1],
                "draws": 5,
                "resamples": 5,
                "confidence": 0.9,
                "seed": 1,
            },
            {
                "measured": "result",
                "align": "word",
                "quantile": "share",
                "lookback": "distance",
                "peaks": "word",
                "null": "word",
                "clusters": "clusters",
                "draws": "count",
                "resamples": "count",
                "confidence": "share",
                "seed": "distance",
            },
        ),
        Call(
            "compare_groups",
            attnprobe.compare_groups,
            {"first": heads, "second": heads},
            {"first": "result", "second": "result"},
        ),
        Call(
            "group_stability",
            attnprobe.group_stability,
            {
                "statistics": stats,
                "quantile": 0.3,
                "receivers": 3,
                "resamples": 5,
                "confidence": 0.9,
                "seed": 1,
            },
            {
                "statistics": "result",
                "quantile": "share",
                "receivers": "count",
                "resamples": "count",
                "confidence": "share",
                "seed": "distance",
            },
        ),
        Call(
            "knockout_divergence",
            attnprobe.knockout_divergence,
            {
                "model": model,
                "batch": batch,
                "tokens": rhythm.anchor & response,
                "horizon": (1, 6),
                "heads": pairs,
                "batch_size": 4,
            },
            {
                "model": "model",
                "batch": "batch",
                "tokens": "mask",
                "horizon": "horizon",
                "heads": "heads",
                "batch_size": "optional count",
            },
        ),
        Call(
            "knockout",
            attnprobe.knockout,
            {
                "model": model,
                "batch": batch,
                "scores": scores,
                "positions": 1,
                "drawn": 1,
                "seed": 0,
                "horizon": (1, 6),
                "modes": ["value"],
                "min_remaining": 4,
                "batch_size": 2,
            },
            {
                "model": "model",
                "scores": "result",
                "positions": "count",
                "drawn": "distance",
                "seed": "distance",
                "horizon": "horizon",
                "min_remaining": "count",
                "batch_size": "optional count",
            },
        ),
        Call(
            "perturb",
            attnprobe.perturb,
            {
                "model": model,
                "tokenizer": tokenizer,
                "batch": batch,
                "scores": scores,
                "candidates": 2,
                "positions": 1,
                "drawn": 1,
                "seed": 0,
                "max_new_tokens": 2,
                "min_remaining": 4,
            },
            {
                "model": "model",
                "tokenizer": "tokenizer",
                "scores": "result",
                "candidates": "count",
                "positions": "count",
                "drawn": "distance",
                "seed": "distance",
                "max_new_tokens": "count",
                "min_remaining": "count",
            },
        ),
        Call(
            "force_tokens",
            force_tokens,
            {"model": model, "before": ids[0, :5], "token": 7, "candidates": 2, "max_new_tokens": 2},
            {"model": "model", "candidates": "count", "max_new_tokens": "count"},
        ),
        # training
        Call("apply_credit", apply_credit, credit, credit_kinds),
        Call("credit_weights", credit_weights, credit, credit_kinds),
        Call(
            "gate_gradient",
            gate_gradient,
            {"values": torch.ones(2, 3), "weights": torch.full((2, 3), 1.5)},
            {"values": "weights", "weights": "weights"},
        ),
        Call("Rollout", lambda **parts: Rollout(**parts).response_mask, rollout, rollout_kinds),
        Call(
            "Rollout.from_sequences",
            lambda **parts: Rollout.from_sequences(**parts).response_mask,
            {"input_ids": ids, "attention_mask": mask, "response_mask": response},
            {"input_ids": "ids", "attention_mask": "mask", "response_mask": "mask"},
        ),
        Call(
            "Rollout.from_packed",
            lambda **parts: Rollout.from_packed(**parts).response_mask,
            {"input_ids": ids, "position_ids": positions, "response_mask": response},
            {"input_ids": "ids", "response_mask": "mask"},
        ),
        Call(
            "honours_weights",
            lambda loss: bool(honours_weights(loss)),
            {"loss": reinforced},
            {"loss": "credit"},
        ),
        Call("warmup", warmup, {"steps": 3}, {"steps": "count"}),
        Call(
            "decay",
            decay,
            {"steps": 3, "begin": 2, "to": 0.5},
            {"steps": "count", "begin": "distance", "to": "nonnegative"},
        ),
        Call(
            "measure_rollout",
            measure_rollout,
            {
                "model": model,
                "rollout": Rollout(**rollout),
                "layers": [0, 1],
                "window": 4,
                "horizon": horizon,
                "span": True,
                "batch_size": 2,
            },
            {
                "model": "model",
                "rollout": "result",
                "layers": "layers",
                "window": "count",
                "horizon": "horizon",
                "span": "switch",
                "batch_size": "optional count",
            },
        ),
        Call(
            "score_rollout",
            score_rollout,
            {"statistics": None, "heads": None, "rollout": Rollout(**rollout)},
            {"rollout": "result"},
        ),
        Call(
            "RolloutCredit",
            lambda advantages, **options: RolloutCredit(model, **options).weigh(
                Rollout(**rollout), advantages, 0
            ),
            {
                "advantages": torch.tensor([1.0, -1.0, 2.0]),
                "credit": CoupledRhythmCredit(),
                "layers": [0, 1],
                "reclassify_every": 3,
                "window": 4,
                "horizon": horizon,
                "batch_size": 2,
                "token_budget": 40,
                "schedule": decay(3),
            },
            {
                "advantages": "advantages",
                "credit": "credit",
                "layers": "layers",
                "reclassify_every": "optional count",
                "window": "count",
                "horizon": "horizon",
                "batch_size": "optional count",
                "token_budget": "optional count",
                "schedule": "schedule",
            },
        ),
        *(
            Call(
                kind.__name__,
                lambda kind=kind, **options: kind(**options)(scores),
                {"amplification": 1.5, "quantile": 0.4, "normalize": False},
                {"amplification": "nonnegative", "quantile": "share", "normalize": "switch"},
            )
            for kind in (
                LocalChunkCredit,
                GlobalAnchorCredit,
                CoupledRhythmCredit,
                EntropyCredit,
                RandomCredit,
            )
        ),
        Call(
            "CoupledRhythmCredit",
            lambda **options: CoupledRhythmCredit(**options)(scores),
            {"alpha": 0.5, "lookback": 2, "align": "token", "select": "top"},
            {"alpha": "nonnegative", "lookback": "count", "align": "word", "select": "word"},
        ),
        Call("credit(scores)", CoupledRhythmCredit(), {"scores": scores}, {"scores": "result"}),
        Call(
            "PPOConfig",
            PPOConfig,
            {"steps": 3, "gamma": 0.9, "gae_lambda": 0.9, "estimator": "gae", "seed": 1},
            {
                "steps": "count",
                "gamma": "nonnegative",
                "gae_lambda": "nonnegative",
                "estimator": "word",
                "seed": "distance",
            },
        ),
        # models
        Call("load_model", load_model, {"source": "x"}, {"source": "path"}),
        # figures
        *(
            Call(
                f"figures.{name}",
                lambda name=name, **options: str(getattr(attnprobe.figures, name)(**options)),
                {"scores": scores, "rhythm": rhythm, "example": 0} | more,
                {"scores": "result", "rhythm": "result", "example": "index"} | kinds,
            )
            for name, more, kinds in (
                ("rhythm", {}, {}),
                ("tokens", {"batch": batch, "score": "fai"}, {"score": "word"}),
            )
        ),
        Call(
            "figures.heads",
            lambda **options: str(attnprobe.figures.heads(**options)),
            {"groups": heads},
            {"groups": "result"},
        ),
        Call(
            "figures.head_map",
            lambda **options: str(attnprobe.figures.head_map(model, batch, **options)),
            {"layer": 1, "head": 2, "example": 0},
            {"layer": "index", "head": "index", "example": "index"},
        ),
        Call(
            "tokens of the model",
            lambda **options: attnprobe.adapter_for(**options).layers,
            {"model": model},
            {"model": "model"},
        ),
    ]
    for name, kinds in {
        "mean_attention_distance": {},
        "windowed_attention_distance": {"window": (3, "count")},
        "future_attention_influence": {"horizon": ((1, 4), "horizon")},
        "receiver_kurtosis": {"horizon": ((1, 4), "horizon"), "minimum_rows": (2, "count")},
    }.items():
        found.append(
            Call(
                name,
                getattr(metrics, name),
                {"attention": pattern, "response_mask": rows}
                | {key: value for key, (value, _) in kinds.items()},
                {"attention": "pattern", "response_mask": "mask"}
                | {key: kind for key, (_, kind) in kinds.items()},
            )
        )
    results = {"stats": stats, "heads": heads, "scores": scores, "rhythm": rhythm, "batch": batch}
    for name, result in results.items():
        found.append(Call(f"{name}.to", result.to, {"device": "cpu"}, {"device": "device"}))
        found.append(Call(f"{name}.save", result.save, {"path": saved[name]}, {"path": "path"}))
        found.append(Call(f"{name}.load", result.load, {"path": saved[name]}, {"path": "path"}))
        if name != "heads":
            found.append(
                Call(f"{name}.select", result.select, {"examples": [0, 2]}, {"examples": "examples"})
            )
    return found


__all__ = ["Call", "calls", "generate_response", "prompt_ids"]
