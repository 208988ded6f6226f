"""What `attnprobe doctor` finds out: versions, backends, and which attention implementations can be read.

The command line prints these tables. Everything is tried, not looked up: a backend is imported, and an
attention implementation runs a tiny model whose statistics are compared with those of eager attention. What
is left to others: printing, and the exit code (cli).
"""

from __future__ import annotations

import importlib
import platform

import torch
from rich.markup import escape
from rich.table import Table

from attnprobe.adapters.versions import SUPPORTED, installed_version, is_tested, refusal
from attnprobe.version import __version__

_BASE = ("torch", "transformers", "einops", "jaxtyping", "safetensors", "numpy")
_EXTRAS = {
    "transformer_lens": "transformer-lens",
    "nnsight": "nnsight",
    "trl": "trl",
    "peft": "",
    "jinja2": "report",
    "pandas": "report",
    "gguf": "gguf",
    "accelerate": "gguf",
}
"""The optional packages, by module, and the extra that brings each; none brings PEFT."""

_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flex_attention")


def version_table() -> Table:
    """Return the versions of Python, the machine, and the libraries that attnprobe always needs.

    Where the version matters, the range that attnprobe was tested with is beside it.
    """
    table = Table("", "version", "supported", title="Versions", title_justify="left")
    table.add_row("attnprobe", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in _BASE:
        table.add_row(name, installed_version(name) or "[red]missing[/]", _support(name))
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("devices", ", ".join(devices) or f"CPU, {torch.get_num_threads()} threads")
    return table


def backend_table() -> Table:
    """Return which optional packages import, and the extra that installs those that do not."""
    table = Table("", "version", "supported", "", title="Optional packages", title_justify="left")
    for module, extra in _EXTRAS.items():
        package = module.replace("_", "-")
        version, support = installed_version(package), _support(package)
        if version is None:
            wanted = f"'attnprobe\\[{extra}]'" if extra else f"'{package}{SUPPORTED[package]}'"
            table.add_row(module, "-", support, f"pip install {wanted}")
            continue
        try:
            importlib.import_module(module)
        except Exception as error:
            table.add_row(module, version, support, f"[red]does not import:[/] {escape(_first_line(error))}")
        else:
            table.add_row(module, version, support, "[green]imports[/]")
    return table


def implementation_table() -> tuple[Table, bool]:
    """Return which attention implementations run and are read correctly, and whether any is."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    table = Table("", "", title="Attention implementations (a tiny model, here)", title_justify="left")
    any_works = False
    for implementation in _IMPLEMENTATIONS:
        try:
            difference = _difference_from_eager(implementation)
        except Exception as error:
            table.add_row(implementation, f"does not run: {escape(_first_line(error))}")
            continue
        correct = difference < 1e-3
        any_works |= correct
        verdict = "[green]reads correctly[/]" if correct else "[red]misreads[/]"
        table.add_row(implementation, f"{verdict}, {difference:.1e} from eager maps")
    return table, any_works


def _difference_from_eager(implementation: str) -> float:
    """Return the largest difference between an implementation's WAAD and that of eager maps."""
    from attnprobe import metrics
    from attnprobe.batch import TokenBatch
    from attnprobe.measurement import measure
    from attnprobe.testing.tiny_models import tiny_model

    ids = torch.arange(1, 41)[None]
    batch = TokenBatch.from_ids(ids, response_start=8)
    measured = measure(tiny_model("llama", implementation=implementation), batch, entropy=False)
    with torch.no_grad():
        maps = tiny_model("llama", implementation="eager")(ids, output_attentions=True).attentions
    worst = 0.0
    for index, pattern in enumerate(maps):
        expected = metrics.windowed_attention_distance(pattern, batch.response_mask, 10)
        worst = max(worst, float((measured.waad[:, index] - expected).nan_to_num().abs().max()))
    return worst


def _support(package: str) -> str:
    """Return the supported range of a package, and whether the installed version lies outside it."""
    supported, installed = SUPPORTED.get(package), installed_version(package)
    if supported is None:
        return ""
    if installed is not None and refusal(package, installed) is not None:
        return f"[red]{supported}: this version is not read[/]"
    if installed is not None and not is_tested(package, installed):
        return f"[yellow]{supported}: this version was not tested[/]"
    return supported


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
