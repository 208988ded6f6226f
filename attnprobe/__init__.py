"""attnprobe: read a language model's attention in its own forward pass, and put it to work.

    batch  = attnprobe.TokenBatch.from_text(tokenizer, prompts, responses)
    stats  = attnprobe.measure(model, batch)
    heads  = attnprobe.classify_heads(stats)
    scores = attnprobe.score_tokens(stats, heads)
    rhythm = attnprobe.find_rhythm(scores)
    attnprobe.Report(batch, stats, heads, scores, rhythm).save("report.html")

This module is the public interface. Nothing heavy is loaded with it: backends, plotting and trainers are
loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from attnprobe import metrics
from attnprobe.adapters import adapter_for, register_adapter
from attnprobe.analysis.agreement import GroupAgreement, GroupStability, compare_groups, group_stability
from attnprobe.analysis.bootstrap import Estimate
from attnprobe.analysis.coupling_results import Coupling, Couplings
from attnprobe.analysis.couplings import couplings
from attnprobe.analysis.knockout import knockout_divergence
from attnprobe.analysis.knockout_trials import Knockouts, knockout
from attnprobe.analysis.perturbation import perturb
from attnprobe.analysis.trials import Perturbations
from attnprobe.attention import Attention, DenseAttention, FactoredAttention
from attnprobe.batch import TokenBatch
from attnprobe.errors import (
    AttnprobeError,
    AttnprobeWarning,
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
from attnprobe.head_groups import HeadGroups
from attnprobe.head_selection import HeadSelection
from attnprobe.head_statistics import HeadStatistics
from attnprobe.heads import classify_heads
from attnprobe.maps import GroupMaps
from attnprobe.measurement import group_maps, measure
from attnprobe.probe import Attachment, Probe, attach
from attnprobe.provenance import Provenance
from attnprobe.receivers import SentenceReceiverProbe
from attnprobe.report import Report, Reports
from attnprobe.rhythm import Rhythm, find_rhythm
from attnprobe.scores import TokenScores, score_tokens
from attnprobe.sentences import SentenceReceivers, sentence_ids
from attnprobe.statistics_probe import HeadStatisticsProbe
from attnprobe.suppression import suppress_attention
from attnprobe.version import __version__

if TYPE_CHECKING:
    from attnprobe import corpus, figures, models, rl, testing
    from attnprobe.corpus import load_scores

__all__ = [
    "Attachment",
    "Attention",
    "AttnprobeError",
    "AttnprobeWarning",
    "BatchError",
    "Coupling",
    "Couplings",
    "DenseAttention",
    "Estimate",
    "FactoredAttention",
    "GroupAgreement",
    "GroupMaps",
    "GroupStability",
    "HeadGroups",
    "HeadSelection",
    "HeadStatistics",
    "HeadStatisticsProbe",
    "IncompleteRunError",
    "InterventionError",
    "Knockouts",
    "MissingDependencyError",
    "ModelLoadError",
    "ParameterError",
    "PatternError",
    "Perturbations",
    "Probe",
    "Provenance",
    "Report",
    "Reports",
    "ResultError",
    "Rhythm",
    "SentenceReceiverProbe",
    "SentenceReceivers",
    "TokenBatch",
    "TokenScores",
    "TrainerError",
    "UnsupportedModelError",
    "__version__",
    "adapter_for",
    "attach",
    "classify_heads",
    "compare_groups",
    "corpus",
    "couplings",
    "figures",
    "find_rhythm",
    "group_maps",
    "group_stability",
    "knockout",
    "knockout_divergence",
    "load_scores",
    "measure",
    "metrics",
    "models",
    "perturb",
    "register_adapter",
    "rl",
    "score_tokens",
    "sentence_ids",
    "suppress_attention",
    "testing",
]


def __getattr__(name: str) -> Any:
    """Load the packages that not everyone needs on first use."""
    if name in ("corpus", "figures", "models", "rl", "testing"):
        return importlib.import_module(f"attnprobe.{name}")
    if name == "load_scores":
        return importlib.import_module("attnprobe.corpus").load_scores
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
