"""The operator core: a layer's attention as a linear operator on token features.

Adapters make attentions, and metrics ask them questions; nothing here knows a model or a metric. `operator`
holds the contract and the dense oracle, `factored` the answers from query and key. Below it, `block_scores`
holds the scores of a block of pairs, `row_sums` what each row sums to, `masks` which keys a query may see,
`tiles` which blocks answer a question, and `kernels` what a model's own kernel computes along the way.
"""

from attnprobe.attention.factored import FactoredAttention
from attnprobe.attention.masks import CausalMask
from attnprobe.attention.operator import Attention, DenseAttention, key_positions, reduction_dtype

__all__ = [
    "Attention",
    "CausalMask",
    "DenseAttention",
    "FactoredAttention",
    "key_positions",
    "reduction_dtype",
]
