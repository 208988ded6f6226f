"""What importing attnprobe loads, which room may import which, and that the package is what it says."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib import resources
from pathlib import Path

import pytest

import attnprobe

HEAVY = (
    "transformer_lens",
    "nnsight",
    "trl",
    "verl",
    "ray",
    "matplotlib",
    "jinja2",
    "pandas",
    "hypothesis",
    "gguf",
    "accelerate",
)


@pytest.mark.parametrize(
    "code",
    ["import attnprobe", "import attnprobe, attnprobe.adapters, attnprobe.cli, attnprobe.rl"],
)
def test_importing_loads_nothing_heavy(code: str) -> None:
    """Optional backends, trainers and plotting load when they are used."""
    check = f"import sys; {code}; print([m for m in {HEAVY!r} + ('transformers',) if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    assert sorted(set(attnprobe.__all__)) == sorted(attnprobe.__all__)
    assert [name for name in attnprobe.__all__ if not hasattr(attnprobe, name)] == []


def test_the_package_is_typed() -> None:
    assert resources.files("attnprobe").joinpath("py.typed").is_file()


# ---- which module imports which -----------------------------------------------------------------

ROOT = Path(attnprobe.__file__).parent


@lru_cache(maxsize=1)
def module_files() -> dict[str, Path]:
    """Return the file of each module of the package; a folder stands for its `__init__`."""
    files = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imports_of_a_module(tree: ast.AST, types_too: bool = True) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports of a module, those inside its functions left out.

    With `types_too`, also those under `if TYPE_CHECKING`, which never run.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not types_too:
            for other in node.orelse:
                yield from imports_of_a_module(ast.Module([other], []))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports_of_a_module(node, types_too)


@lru_cache(maxsize=2)
def arrows(types_too: bool = True) -> frozenset[tuple[str, str]]:
    """Return (module, what it imports): modules of ours by their full name, and packages of others."""
    known = module_files()
    found = set()
    for name, path in known.items():
        for node in imports_of_a_module(ast.parse(path.read_text(encoding="utf-8")), types_too):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                assert node.level == 0, f"{name} imports by a relative path"
                assert node.module is not None
                # `from attnprobe import metrics` is an arrow to metrics, not to the public face.
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [target if target in known else node.module for target in inside]
            ours = {target for target in targets if target.partition(".")[0] == "attnprobe"}
            found |= {(name, target) for target in ours}
            found |= {(name, target.partition(".")[0]) for target in set(targets) - ours}
    return frozenset(found)


def is_in(module: str, *rooms: str) -> bool:
    """Whether a module lies in one of the rooms, given without the package's name."""
    return any(module == f"attnprobe.{room}" or module.startswith(f"attnprobe.{room}.") for room in rooms)


def cycles() -> list[list[str]]:
    """Return the groups of modules that import each other in a circle."""
    following: dict[str, set[str]] = {name: set() for name in module_files()}
    for source, target in arrows():
        if target in following:
            following[source].add(target)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(following[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += following[name]
        return seen

    reach = {name: reached(name) for name in following}
    circles = {
        tuple(sorted(other for other in reach[name] if name in reach[other]))
        for name in reach
        if name in reach[name]
    }
    return [list(circle) for circle in sorted(circles)]


# Arrows that stand against a rule below, with the reason why they may, for now.
ALLOWED: dict[tuple[str, str], str] = {}


def forbidden_library(source: str, target: str) -> str | None:
    """Return why a module may not load a library of others when it is imported, None where it may."""
    if target in ("transformer_lens", "nnsight", "trl", "matplotlib", "pandas"):
        return "backends, trainers, plotting and tables load when they are used"
    if target in ("verl", "ray", "tensordict") and source != "attnprobe.rl.verl.engine":
        return "verl loads its own engine when it is asked to"
    if target == "transformers" and not is_in(source, "adapters", "rl.trl", "testing"):
        return "only adapters, rl.trl and testing know transformers"
    return None


def forbidden(source: str, target: str) -> str | None:
    """Return why a module of ours may not import another, None where it may."""
    if target.partition(".")[0] != "attnprobe":
        return None
    if is_in(source, "attention") and not is_in(target, "attention", "errors", "validation"):
        return "the operator core knows no model and no metric"
    above = (
        "metrics",
        "metric_arguments",
        "sentence_metrics",
        "head_statistics",
        "heads",
        "head_groups",
        "scores",
        "rhythm",
        "rl",
        "report",
        "analysis",
    )
    if is_in(source, "adapters") and is_in(target, *above):
        return "a backend knows no metric"
    if is_in(source, "report") and is_in(target, "adapters", "measurement"):
        return "the report reads results, never models"
    # The public face offers testing by name, and loads it when it is asked for.
    if is_in(target, "testing") and not is_in(source, "testing", "doctor") and source != "attnprobe":
        return "only tests and doctor use testing"
    return None


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert cycles() == []


def test_every_arrow_points_the_way_that_the_design_says() -> None:
    """docs/design.md: everything flows in one direction."""
    found = {
        (source, target): reason
        for rule, lines in ((forbidden, arrows()), (forbidden_library, arrows(types_too=False)))
        for source, target in lines
        if (reason := rule(source, target)) is not None
    }
    assert {arrow: reason for arrow, reason in found.items() if arrow not in ALLOWED} == {}
    assert sorted(set(ALLOWED) - set(found)) == [], "no longer needed"


def test_the_walk_sees_what_it_should() -> None:
    """A walk that finds nothing forbids nothing."""
    assert ("attnprobe.measurement", "attnprobe.probe") in arrows()
    assert ("attnprobe.measurement", "attnprobe.metrics") in arrows()
    assert ("attnprobe.adapters.interception", "transformers") in arrows()
    tree = ast.parse(
        "import a\nif TYPE_CHECKING:\n    import b\ntry:\n    import c\nexcept ImportError: pass\n"
        "class D:\n    import d\ndef lazy():\n    import e\n"
    )
    names = [alias.name for node in imports_of_a_module(tree) for alias in node.names]
    assert names == ["a", "b", "c", "d"]
    run = [alias.name for node in imports_of_a_module(tree, types_too=False) for alias in node.names]
    assert run == ["a", "c", "d"]
    assert forbidden("attnprobe.attention.masks", "attnprobe.batch")
    assert forbidden("attnprobe.adapters.base", "attnprobe.rl.credit")
    assert forbidden("attnprobe.heads", "attnprobe.testing.tiny_models")
    assert forbidden_library("attnprobe.heads", "transformers")
    assert forbidden_library("attnprobe.adapters.nnsight", "nnsight")
