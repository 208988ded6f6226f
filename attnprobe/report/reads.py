"""Where a token looks, and what looks back at it: the strongest reads and readers in each group's map.

`entry` calls `reads_of` with the maps of an example before they are pooled, and the page draws the arcs
(assets/links.js). Only the strongest are stored, since a page cannot hold a map of 4,096 tokens. What is left
to others: the maps themselves (measurement), and their pictures (maps).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnprobe.maps import GroupMaps
from attnprobe.report.packing import floats, packed

STRONGEST = 8
"""How many reads and readers of a token are stored."""

Links = tuple[Int[Tensor, "token link"], Float[Tensor, "token link"]]


def strongest_reads(attention: Float[Tensor, "token token"], count: int = STRONGEST) -> Links:
    """Return the keys before itself that each query reads most, and their shares of its attention.

    Strongest first, of equal ones the earliest; -1 and NaN where there are no more.

    >>> strongest_reads(torch.tensor([[1.0, 0.0], [0.75, 0.25]]), 1)[0].tolist()
    [[-1], [0]]
    """
    return _strongest(attention.tril(-1), count)


def strongest_readers(attention: Float[Tensor, "token token"], count: int = STRONGEST) -> Links:
    """Return the later queries that read each key most, and the shares of their attention that they give it.

    >>> strongest_readers(torch.tensor([[1.0, 0.0], [0.75, 0.25]]), 1)[0].tolist()
    [[1], [-1]]
    """
    return _strongest(attention.tril(-1).T, count)


def reads_of(maps: GroupMaps, tokens: Sequence[int], token_count: int) -> dict[str, Any]:
    """Return the reads and readers of both groups in the form in which the page holds them.

    Args:
        maps: those of one example, without padding.
        tokens: which of the response's tokens each row of the maps is.
        token_count: how many tokens the response has.
    """
    place = torch.tensor(tokens)
    is_whole = len(tokens) == token_count
    found: dict[str, Any] = {"count": STRONGEST}
    for name in ("local", "global"):
        attention = floats(getattr(maps, f"{name}_map")[0])
        prompt = getattr(maps, f"{name}_prompt_share", None)
        first = getattr(maps, f"{name}_first_share", None)
        # What is not on the response is on the prompt, unless a model lets part of a row go to a sink.
        rest = (1 - attention.tril().double().sum(1)).clamp(0, 1) if is_whole else None
        shares = {
            "self": attention.diagonal(),
            "prompt": rest if prompt is None else prompt[0],
            "first": None if first is None else first[0],
        }
        found[name] = {
            "reads": _links(strongest_reads(attention), place, token_count),
            "readers": _links(strongest_readers(attention), place, token_count),
            "isRest": prompt is None,
        } | {
            key: None if values is None else packed(_spread(floats(values), place, token_count), "f4")
            for key, values in shares.items()
        }
    return found


def _strongest(attention: Float[Tensor, "token token"], count: int) -> Links:
    """Return the largest positive entries of each row."""
    values = attention.nan_to_num(0.0)
    shown = min(count, values.shape[1])
    # A stable order, so that the same maps always give the same page.
    share, index = values.topk(shown, dim=1)
    order = index.argsort(dim=1)
    share, index = share.gather(1, order), index.gather(1, order)
    order = share.argsort(dim=1, descending=True, stable=True)
    share, index = share.gather(1, order), index.gather(1, order)
    missing = share <= 0
    share, index = share.masked_fill(missing, torch.nan), index.masked_fill(missing, -1)
    short = count - shown
    return (
        torch.nn.functional.pad(index, (0, short), value=-1),
        torch.nn.functional.pad(share, (0, short), value=torch.nan),
    )


def _links(links: Links, place: Int[Tensor, " row"], token_count: int) -> dict[str, str]:
    """Return links among the response's tokens, packed: a place and a share for each."""
    index, share = links
    dtype, nothing = ("u2", 0xFFFF) if token_count < 0xFFFF else ("u4", 0xFFFFFFFF)
    tokens = torch.where(index >= 0, place[index.clamp(min=0)], nothing)
    everywhere = torch.full((token_count, index.shape[1]), nothing)
    everywhere[place] = tokens
    shares = torch.full((token_count, index.shape[1]), torch.nan)
    shares[place] = share
    return {"dtype": dtype, "token": packed(everywhere, dtype), "share": packed(shares, "f4")}


def _spread(values: Float[Tensor, " row"], place: Int[Tensor, " row"], token_count: int) -> Tensor:
    spread = torch.full((token_count,), torch.nan)
    spread[place] = values
    return spread
