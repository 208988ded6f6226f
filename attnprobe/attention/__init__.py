"""The operator core: a layer's attention as a linear operator on token features.

`operator` holds the contract and the dense oracle, `factored` the answers from query and key, `masks`
which keys a query may see, and `kernels` the kernels that compute along the way. Adapters make
attentions, metrics question them. Nothing here knows a model or a metric.
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
