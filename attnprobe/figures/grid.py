"""Every head of a model as a cell: its span as colour, and the group that it belongs to as a mark.

Users call `heads`. What is left to others: which head is in which group (heads, head_groups).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnprobe.figures.paper import (
    INK,
    WIDTH,
    AxesLike,
    FigureLike,
    given_axes,
    import_matplotlib,
    look,
    new_figure,
)
from attnprobe.head_groups import HeadGroups
from attnprobe.validation import instance

# Marks differ in shape, and have an outline: they can be told apart on any colour, and in grey.
_MARKS = {
    "local": {"marker": "v", "color": "white", "markeredgecolor": "#444444"},
    "global": {"marker": "^", "color": "black", "markeredgecolor": "white"},
    "receiver": {"marker": "o", "markerfacecolor": "none", "markeredgecolor": "#e0218a"},
}
_SHORTEST, _TALLEST = 0.9, 4.0


def heads(groups: HeadGroups, *, axes: AxesLike | None = None) -> FigureLike:
    """Draw the mean span of every head, layers across and heads down, with the groups marked.

    Heads that a layer does not have are left blank.

    Args:
        groups: from `classify_heads`.
        axes: matplotlib axes to draw into; None: a new figure.

    Raises:
        ParameterError: something that is not `HeadGroups`, or not one of matplotlib's axes.
        MissingDependencyError: matplotlib is not installed.

    >>> import torch, attnprobe
    >>> from attnprobe.testing.tiny_models import tiny_model
    >>> batch = attnprobe.TokenBatch.from_ids(torch.arange(1, 41)[None], response_start=4)
    >>> statistics = attnprobe.measure(tiny_model("llama"), batch)
    >>> figure = attnprobe.figures.heads(attnprobe.classify_heads(statistics))
    >>> figure.axes[0].get_xlabel(), figure.axes[1].get_ylabel()
    ('layer', 'mean span (tokens)')
    """
    instance(groups, HeadGroups, "groups", "classify_heads returns them")
    masks = {
        "local": groups.local_heads,
        "global": groups.global_heads,
        "receiver": groups.receiver_heads,
    }
    return span_grid(groups.span, groups.layers, masks, axes)


def span_grid(
    span: Tensor, layers: tuple[int, ...], masks: dict[str, Tensor | None], axes: AxesLike | None = None
) -> FigureLike:
    """Draw spans `[layer, head]` and marks; displays of statistics call this, too."""
    panels = given_axes(axes, 1, "the grid")
    values = span.detach().double().cpu().numpy().T  # [head, layer]
    head_count, layer_count = values.shape
    with look():
        if panels is None:
            cell = 0.72 * WIDTH / max(layer_count, 8)
            height = min(max(cell * head_count, _SHORTEST), _TALLEST)
            panels = [new_figure(height + 0.75).subplots()]
        panel = panels[0]
        image = panel.imshow(values, cmap=_colours(), vmin=0, aspect="auto")
        for name, mask in masks.items():
            if mask is not None and bool(mask.any()):
                _mark(panel, name, mask, max(layer_count, head_count))
        panel.set_xlabel("layer")
        panel.set_ylabel("head")
        _number(panel.set_xticks, layers)
        _number(panel.set_yticks, tuple(range(head_count)))
        panel.spines[["top", "right"]].set_visible(True)
        bar = panel.figure.colorbar(image, ax=panel, aspect=25, pad=0.02)
        bar.set_label("mean span (tokens)")
        bar.outline.set_linewidth(0.6)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(
                loc="lower left",
                bbox_to_anchor=(0, 1.0),
                ncols=3,
                borderaxespad=0.2,
                labelcolor=INK,
                markerscale=1.5,
            )
    found: FigureLike = panel.figure
    return found


def _colours() -> Any:
    """Return a map of colours for values of which none is missing, and pale grey for missing ones."""
    return import_matplotlib().colormaps["cividis"].with_extremes(bad="#eeeeee")


def _mark(panel: Any, name: str, mask: Tensor, cells: int) -> None:
    layers, places = mask.nonzero().cpu().unbind(1)
    size = min(4.5, max(1.6, 90 / cells))
    panel.plot(
        layers.tolist(),
        places.tolist(),
        linestyle="none",
        markersize=size * (1.7 if name == "receiver" else 1),
        markeredgewidth=0.7 if name == "receiver" else 0.3,
        label=name,
        **_MARKS[name],
    )


def _number(set_ticks: Any, numbers: tuple[int, ...]) -> None:
    """Label some of the cells of an axis with their numbers; there is no room for all of them."""
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50, 100) if len(numbers) / step <= 10 or step == 100)
    at = range(0, len(numbers), step)
    set_ticks(list(at), [str(numbers[i]) for i in at])
