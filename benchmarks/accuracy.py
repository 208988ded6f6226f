"""How accurate each statistic is in half precision, against float64, at 1k, 8k and 32k tokens.

    python -m benchmarks.accuracy

A model with one layer and sharp attention is measured in bfloat16, as people run models. The reference takes
the very queries and keys of that pass, and computes softmax and definitions in float64, row by row: what is
told is the error of the statistics, not that of a bfloat16 model. Errors are the largest over all heads and
tokens, in the statistic's own units and relative to its largest value. What is left to others: times (cost).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import attnprobe
from attnprobe.reductions import kurtosis

FOLDER = Path(__file__).parent / "results"
WINDOW, HORIZON, ROWS = 10, (10, 100), 512

app = typer.Typer(add_completion=False)


class Keeping(attnprobe.Probe):
    """Keeps the queries and keys of a pass."""

    def observe(self, site: str, layer: int | None, value: Any, batch: attnprobe.TokenBatch) -> None:
        """Copy what the attention call was given."""
        scores = value.scores
        self.query, self.key, self.scale = scores.query.clone(), scores.key.clone(), scores.scaling


def reference(query: Tensor, key: Tensor, scale: float) -> dict[str, Tensor]:
    """Return the statistics of every head from the maps themselves, a few rows at a time, in float64."""
    query, key = query[0].double(), key[0].double()
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    heads, count = query.shape[:2]
    span = query.new_zeros(heads)
    waad, near, far = (query.new_zeros(heads, count) for _ in range(3))
    place = torch.arange(count)
    for begin in range(0, count, ROWS):
        rows = place[begin : begin + ROWS]
        distance = rows[:, None] - place[: rows[-1] + 1]
        scores = torch.einsum("hqd,hkd->hqk", query[:, rows], key[:, : rows[-1] + 1]) * scale
        pattern = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        past = distance.clamp(min=0)
        span += (pattern * past).sum((-1, -2)) / count
        waad[:, rows] = (pattern * past.clamp(max=WINDOW)).sum(-1)
        within = (distance >= HORIZON[0]) & (distance <= HORIZON[1])
        near[:, : rows[-1] + 1] += (pattern * within).sum(-2)
        far[:, : rows[-1] + 1] += (pattern * (distance >= HORIZON[0])).sum(-2)
    far_rows = (count - place - HORIZON[0]).clamp(min=0).double()
    near_rows = far_rows.clamp(max=HORIZON[1] - HORIZON[0] + 1)
    to_end = far / far_rows
    return {
        "span": span,
        "WAAD": waad,
        "FAI[10,100]": near / near_rows,
        "FAI to the end": to_end,
        # Tokens that fewer than ten rows read are left out.
        "receiver kurtosis": kurtosis(to_end.masked_fill(far_rows < 10, torch.nan)),
    }


def measured(model: Any, batch: attnprobe.TokenBatch) -> dict[str, Tensor]:
    """Return the same statistics, as `measure` computes them."""
    options = {"layers": [0], "window": WINDOW, "entropy": False, "share_on": (), "span_ignores": ()}
    near = attnprobe.measure(model, batch, horizon=HORIZON, receiver="token", **options)
    far = attnprobe.measure(model, batch, horizon=(HORIZON[0], None), span=False, **options)
    return {
        "span": near.span[0, 0],
        "WAAD": near.waad[0, 0],
        "FAI[10,100]": near.fai[0, 0],
        "FAI to the end": far.fai[0, 0],
        "receiver kurtosis": near.receiver_kurtosis[0, 0],
    }


@app.command()
def run(
    tokens: Annotated[str, typer.Option(help="Numbers of tokens.")] = "1024,8192,32768",
    dtypes: Annotated[str, typer.Option(help="Precisions of the model.")] = "bfloat16,float32",
    output: Annotated[Path, typer.Option(help="The folder for results.")] = FOLDER,
) -> None:
    """Measure, print the table, and save the numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    table = Table("dtype", "tokens", "statistic", "largest value", "largest error", "relative")
    lines: list[dict[str, Any]] = []
    for dtype in dtypes.split(","):
        for count in map(int, tokens.split(",")):
            torch.manual_seed(0)
            config = LlamaConfig(
                hidden_size=128,
                intermediate_size=128,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                vocab_size=1024,
                max_position_embeddings=count,
                # Wide enough for scores of about 3, as in trained models; the default gives even attention.
                initializer_range=0.12,
            )
            model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
            batch = attnprobe.TokenBatch.from_ids(torch.randint(0, 1024, (1, count)))
            keeping = Keeping()
            with attnprobe.attach(model, keeping), torch.no_grad():
                model.model(batch.input_ids)
            expected, found = reference(keeping.query, keeping.key, keeping.scale), measured(model, batch)
            for name, values in expected.items():
                known = values.isfinite()
                error = float((found[name].double() - values)[known].abs().max())
                largest = float(values[known].abs().max())
                lines.append(
                    {
                        "dtype": dtype,
                        "tokens": count,
                        "statistic": name,
                        "largest": largest,
                        "error": error,
                        "relative": error / largest,
                    }
                )
                table.add_row(
                    dtype, str(count), name, f"{largest:.4g}", f"{error:.1e}", f"{error / largest:.1e}"
                )
    Console(width=110).print(table)
    output.mkdir(parents=True, exist_ok=True)
    (output / "accuracy.json").write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    app()
