"""attnprobe: read a language model's attention in its own forward pass, and put it to work.

    batch  = attnprobe.TokenBatch.from_text(tokenizer, prompts, responses)
    stats  = attnprobe.measure(model, batch)
    heads  = attnprobe.classify_heads(stats)
    scores = attnprobe.score_tokens(stats, heads)
    rhythm = attnprobe.find_rhythm(scores)
    attnprobe.Report(batch, stats, heads, scores, rhythm).save("report.html")

This module is the public face. Nothing heavy is loaded with it: backends, plotting and trainers load
when they are used.
"""

from attnprobe import metrics
from attnprobe.adapters import adapter_for, register_adapter
from attnprobe.attention import Attention, DenseAttention
from attnprobe.batch import TokenBatch
from attnprobe.errors import (
    AttnprobeError,
    BatchError,
    IncompleteRunError,
    InterventionError,
    MissingDependencyError,
    ModelLoadError,
    ParameterError,
    PatternError,
    ResultError,
    TrainerError,
    UnsupportedModelError,
)
from attnprobe.factored import FactoredAttention
from attnprobe.head_statistics import HeadStatistics, HeadStatisticsProbe
from attnprobe.heads import HeadGroups, classify_heads
from attnprobe.measurement import GroupMaps, group_maps, measure
from attnprobe.probe import Attachment, Probe, attach
from attnprobe.report import Report
from attnprobe.rhythm import Rhythm, find_rhythm
from attnprobe.scores import TokenScores, score_tokens
from attnprobe.suppression import suppress_attention
from attnprobe.version import __version__

__all__ = [
    "Attachment",
    "Attention",
    "AttnprobeError",
    "BatchError",
    "DenseAttention",
    "FactoredAttention",
    "GroupMaps",
    "HeadGroups",
    "HeadStatistics",
    "HeadStatisticsProbe",
    "IncompleteRunError",
    "InterventionError",
    "MissingDependencyError",
    "ModelLoadError",
    "ParameterError",
    "PatternError",
    "Probe",
    "Report",
    "ResultError",
    "Rhythm",
    "TokenBatch",
    "TokenScores",
    "TrainerError",
    "UnsupportedModelError",
    "__version__",
    "adapter_for",
    "attach",
    "classify_heads",
    "find_rhythm",
    "group_maps",
    "measure",
    "metrics",
    "register_adapter",
    "score_tokens",
    "suppress_attention",
]
