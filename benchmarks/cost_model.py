"""What reading attention should cost: multiplications and additions, counted from the shapes.

The benchmark's table shows these counts. Attention-sized products and band products are counted;
exponentials, sums and memory traffic are not, so a measured ratio exceeds the counted one by what they take.
What is left to others: measuring (cost).
"""

from __future__ import annotations

from benchmarks.subjects import SHAPE

_BAND, _BAND_QUERIES = 101, 32
_HEADS = SHAPE["num_attention_heads"]
_WIDTH = SHAPE["hidden_size"] // _HEADS


def counted_ratio(subject: str, tokens: int, layers: int) -> float | None:
    """Return a subject's operations divided by the plain pass's; None for subjects that store maps."""
    attention = 2 * tokens * tokens * _WIDTH * _HEADS
    # Three more columns in query, key and value: where a row looks, with the first token and without it.
    positions = 3 * attention / _WIDTH
    band = 2 * tokens * (_BAND + _BAND_QUERIES - 1) * _WIDTH * _HEADS
    # Queries times keys below the diagonal, and the weighted column sums of the tiles, for the rows of the
    # response: the last three quarters of the tokens, which hold 15 of 16 pairs.
    columns = tokens * tokens * (_WIDTH + 1) * _HEADS * 15 / 16
    projections, rest = _linear(tokens)
    plain = layers * (attention + projections + rest)
    # Nothing runs after the attention of the last layer that is read.
    stopped = plain - rest
    if subject == "plain":
        return 1.0
    if subject == "measure":
        return (stopped + layers * (positions + band)) / plain
    if subject == "without span":
        return (stopped + layers * band) / plain
    if subject == "attached":
        return (plain + layers * band) / plain
    if subject == "five layers":
        last = 2 * layers // 3
        return (stopped * (last + 1) / layers - rest * last / layers + 5 * (positions + band)) / plain
    # The first quarter is the prompt, whose logits nobody needs.
    logits = 2.0 * 0.75 * tokens * SHAPE["hidden_size"] * SHAPE["vocab_size"]
    if subject == "plain with entropy":
        return (plain + logits) / plain
    if subject == "as called":
        return (plain + logits + layers * (positions + band)) / plain
    if subject == "receive":
        return (stopped + layers * (positions + band / _BAND + columns)) / plain
    return None


def _linear(tokens: int) -> tuple[float, float]:
    """Return the operations of a layer's query, key and value projections, and of what follows attention."""
    wide, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    key_wide = wide * SHAPE["num_key_value_heads"] // _HEADS
    return 2.0 * tokens * wide * (wide + 2 * key_wide), 2.0 * tokens * wide * (wide + 3 * inner)
