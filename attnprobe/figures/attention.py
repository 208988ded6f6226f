"""Maps of attention as pictures: those of the head groups side by side, or that of a single head.

Users call `maps` and `head_map`. Maps of long responses are pooled, since neither paper nor screens show more
cells. What is left to others: computing maps (measurement) and the look (paper).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.batch import BatchLike
from attnprobe.figures.paper import (
    AxesLike,
    FigureLike,
    given_axes,
    import_matplotlib,
    look,
    new_figure,
)
from attnprobe.figures.reading import Within, shown_part
from attnprobe.maps import GroupMaps
from attnprobe.measurement import group_maps
from attnprobe.validation import IntLike, instance, whole_number

_MOST_CELLS = 512
# Attention spans many decades, and the lowest are noise: this many below the largest get the lightest colour.
_DECADES = 3
_COLOURS = ("#f4f6f8", "#c6dbef", "#6baed6", "#2171b5", "#08203f")


def maps(
    maps: GroupMaps, *, example: IntLike = 0, within: Within = None, axes: AxesLike | None = None
) -> FigureLike:
    """Draw the mean maps of the local and the global heads side by side, in logarithmic colours.

    Queries go down and keys across, both as numbers of response tokens. Values under a thousandth of the
    largest have the lightest colour, and keys after their query are white.

    Args:
        maps: from `group_maps`.
        example: which example to draw.
        within: which of its response tokens: `(first, stop)`, or `(first, None)` to the end; None: all.
        axes: two matplotlib axes to draw into, for local and global; None: a new figure.

    Raises:
        ParameterError: an example that there is not, a part without tokens, or another number of axes.
        MissingDependencyError: matplotlib is not installed.

    >>> import torch, attnprobe
    >>> from attnprobe.testing.tiny_models import tiny_model
    >>> batch = attnprobe.TokenBatch.from_ids(torch.arange(1, 41)[None], response_start=4)
    >>> figure = attnprobe.figures.maps(attnprobe.group_maps(tiny_model("llama"), batch, "all"))
    >>> [axes.get_title() for axes in figure.axes][:2]
    ['local heads', 'global heads']
    """
    instance(maps, GroupMaps, "maps", "group_maps returns them")
    example = whole_number(example, "example", maximum=maps.columns.shape[0] - 1)
    panels = given_axes(axes, 2, "local, global")
    part = shown_part(len(maps.columns_of(example)), within)
    named = {"local heads": maps.local_map, "global heads": maps.global_map}
    return _draw_maps({name: each[example, part, part] for name, each in named.items()}, part.start, panels)


def head_map(
    model: Any,
    batch: BatchLike,
    layer: IntLike,
    head: IntLike,
    *,
    example: IntLike = 0,
    within: Within = None,
    axes: AxesLike | None = None,
) -> FigureLike:
    """Draw the map of one head over a response, as `maps` does; this runs the model once, for that head.

    Args:
        model, batch: as for `measure`.
        layer, head: the head, as in "L11H1".
        example, within: what to draw, as for `maps`.
        axes: matplotlib axes to draw into; None: a new figure.

    Raises:
        ParameterError: a head that the model does not have, or an example or part that there is not.
        UnsupportedModelError: a model whose attention cannot be read.
        MissingDependencyError: matplotlib is not installed.

    >>> import torch, attnprobe
    >>> from attnprobe.testing.tiny_models import tiny_model
    >>> batch = attnprobe.TokenBatch.from_ids(torch.arange(1, 41)[None], response_start=4)
    >>> attnprobe.figures.head_map(tiny_model("llama"), batch, 2, 1).axes[0].get_title()
    'L2H1'
    """
    import_matplotlib()
    panels = given_axes(axes, 1, "the map")
    layer, head = whole_number(layer, "layer"), whole_number(head, "head")
    found = group_maps(model, batch, [(layer, head)], example=example)
    part = shown_part(len(found.columns_of(0)), within)
    return _draw_maps({f"L{layer}H{head}": found.global_map[0, part, part]}, part.start, panels)


def _draw_maps(named: dict[str, Tensor], first: int, panels: list[Any] | None) -> FigureLike:
    """Draw maps with shared colours; `first` is the number of their first response token."""
    matplotlib = import_matplotlib()
    tokens = next(iter(named.values())).shape[0]
    block = math.ceil(tokens / _MOST_CELLS)
    pooled = {name: pooled_map(values, block) for name, values in named.items()}
    high = max(float(values.nan_to_num().max()) for values in pooled.values()) or 1.0
    with look():
        norm = matplotlib.colors.LogNorm(high / 10**_DECADES, high, clip=True)
        colours = matplotlib.colors.LinearSegmentedColormap.from_list("attention", _COLOURS)
        colours = colours.with_extremes(bad="white")
        if panels is None:
            # Constrained layout would leave room around pictures whose shape is fixed.
            figure = new_figure(2.4 if len(pooled) > 1 else 2.75, layout="compressed")
            panels = list(figure.subplots(1, len(pooled), sharey=True, squeeze=False)[0])
        for panel, (name, values) in zip(panels, pooled.items(), strict=True):
            edges = (first - 0.5, first - 0.5 + block * len(values))
            image = panel.imshow(
                values.numpy(), cmap=colours, norm=norm, extent=(*edges, *reversed(edges)), aspect="equal"
            )
            panel.set_title(name)
            panel.set_xlabel("key (response token)")
            panel.locator_params(nbins=5, integer=True)
            panel.spines[["top", "right"]].set_visible(True)
        panels[0].set_ylabel("query (response token)")
        below = len(pooled) > 1
        bar = panels[0].figure.colorbar(
            image,
            ax=panels,
            orientation="horizontal" if below else "vertical",
            aspect=30,
            shrink=0.9,
            pad=0.03,
        )
        bar.set_label("attention")
        bar.outline.set_linewidth(0.6)
    found: FigureLike = panels[0].figure
    return found


def pooled_map(values: Float[Tensor, "token token"], block: int) -> Float[Tensor, "cell cell"]:
    """Return a map in which each cell is the largest value of a block; NaN where keys come after queries.

    The largest, since a mean would fade the narrow columns of anchors.

    >>> pooled_map(torch.eye(4), 2)
    tensor([[1., nan],
            [0., 1.]])
    """
    wide = values.detach().float().cpu()
    if block > 1:
        missing = -wide.shape[0] % block
        padded = torch.nn.functional.pad(wide, (0, missing, 0, missing))
        wide = torch.nn.functional.max_pool2d(padded[None], block)[0]
    future = torch.ones_like(wide, dtype=torch.bool).triu(1)
    return wide.masked_fill(future, torch.nan)
