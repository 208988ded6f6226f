"""Supported versions: one table, which every other place agrees with, and one sentence for all others."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console

import attnprobe
from attnprobe import doctor
from attnprobe.adapters import adapter_for
from attnprobe.adapters.versions import SUPPORTED, check_versions, installed_version, is_tested, refusal
from attnprobe.errors import AttnprobeError, TrainerError, UnsupportedModelError
from attnprobe.testing.backends import BACKENDS
from attnprobe.testing.tiny_models import tiny_model

ROOT = Path(__file__).parent.parent
BATCH = attnprobe.TokenBatch.from_ids([[1, 2, 3, 4, 5, 6]], response_start=2)
OLD = {
    "torch": "2.12.1",
    "transformers": "5.3.0",
    "transformer-lens": "4.2.0",
    "nnsight": "0.7.0",
    "peft": "0.20.0",
    "trl": "1.7.1",
}
NEW = {
    "torch": "2.99.0",
    "transformers": "6.0.0",
    "transformer-lens": "5.0.0",
    "nnsight": "0.9.0",
    "peft": "0.99.0",
    "trl": "2.0.0",
}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch):
    """Return a function that pretends that a version of a package is installed."""
    real = importlib.metadata.version

    def install(package: str, version: str) -> None:
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: version if name == package else real(name)
        )

    return install


def pinned(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


# ---- the table ------------------------------------------------------------------------------------


def test_pyproject_declares_the_same_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    groups.append(project["dependency-groups"]["test"])
    declared = {
        requirement.name: str(requirement.specifier)
        for group in groups
        for requirement in map(Requirement, group)
        if requirement.name in SUPPORTED
    }
    assert {name: sorted(range_.split(",")) for name, range_ in declared.items()} == {
        name: sorted(range_.split(",")) for name, range_ in SUPPORTED.items()
    }


@pytest.mark.parametrize("package", SUPPORTED)
def test_both_ends_of_a_range_can_be_run(package: str) -> None:
    """The oldest version is the lower bound, and the newest is the last before the upper one."""
    lower, upper = (part.lstrip("<>=") for part in SUPPORTED[package].split(","))
    oldest, newest = (Version(pinned(f"constraints-{end}.txt")[package]) for end in ("oldest", "newest"))
    assert oldest == Version(lower)
    assert (newest.major, newest.minor + 1) == Version(upper).release[:2]
    used = pinned("constraints.txt").get(package)
    assert used is None or is_tested(package, used)


@pytest.mark.parametrize("package", SUPPORTED)
def test_what_is_installed_for_the_tests_is_tested(package: str) -> None:
    installed = installed_version(package)
    assert installed is not None
    assert is_tested(package, installed)


# ---- versions outside it --------------------------------------------------------------------------


@pytest.mark.parametrize("package", SUPPORTED)
def test_older_versions_are_refused_in_one_sentence(package: str, pretend) -> None:
    pretend(package, OLD[package])
    with pytest.raises(UnsupportedModelError) as raised:
        check_versions(package)
    needed = package + SUPPORTED[package]
    assert str(raised.value) == (
        f'{package} {OLD[package]} is installed, but attnprobe reads {needed}: pip install "{needed}"'
    )


@pytest.mark.parametrize("package", SUPPORTED)
def test_newer_versions_give_a_warning(package: str, pretend) -> None:
    pretend(package, NEW[package])
    said = rf"^{package} {NEW[package]} is newer than the versions that .* was tested with, .* pip install"
    with pytest.warns(UserWarning, match=said):
        check_versions(package)


@pytest.mark.parametrize("version", ["5.9.0", "5.23.0", "5.24.3", "5.24.0+local", "5.12.0rc1"])
def test_versions_of_the_range_say_nothing(version: str, pretend) -> None:
    pretend("transformers", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_versions("transformers")


def test_versions_before_a_release_count_as_that_release_or_as_older() -> None:
    assert refusal("transformers", "5.9.0.dev0") is not None
    assert refusal("transformers", "5.25.0.dev0") is None
    assert not is_tested("transformers", "5.25.0.dev0")


def test_a_library_without_metadata_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was put on the path by hand tells no version."""

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    check_versions(*SUPPORTED)


# ---- where it is said -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "package"),
    [
        ("transformers", "torch"),
        ("transformers", "transformers"),
        ("transformer_lens", "transformer-lens"),
        ("transformer_lens", "transformers"),
        ("nnsight", "nnsight"),
        ("nnsight", "transformers"),
    ],
)
def test_a_model_is_where_it_is_said(backend: str, package: str, pretend) -> None:
    model = BACKENDS[backend](tiny_model("llama"))
    pretend(package, OLD[package])
    for read in (adapter_for, lambda model: attnprobe.measure(model, BATCH)):
        with pytest.raises(UnsupportedModelError, match=rf"^{package} {OLD[package]} is installed, but"):
            read(model)


def test_a_newer_transformers_is_read_all_the_same(pretend) -> None:
    model = tiny_model("llama")
    expected = attnprobe.measure(model, BATCH)
    pretend("transformers", NEW["transformers"])
    with pytest.warns(UserWarning, match="is newer than"):
        found = attnprobe.measure(model, BATCH)
    torch.testing.assert_close(found.waad, expected.waad, rtol=0, atol=0, equal_nan=True)


def test_a_peft_model_says_so_too(pretend) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    pretend("peft", OLD["peft"])
    with pytest.raises(UnsupportedModelError, match=r"^peft 0\.20\.0 is installed"):
        adapter_for(model)


def test_a_trainer_says_so_too(tmp_path: Path, pretend) -> None:
    from trl import GRPOTrainer

    from attnprobe.rl import CoupledRhythmCredit, attach_credit
    from attnprobe.testing.tiny_trainers import tiny_trainer

    trainer = tiny_trainer(GRPOTrainer, tmp_path)
    pretend("trl", OLD["trl"])
    with pytest.raises(TrainerError, match=r"^trl 1\.7\.1 is installed, but attnprobe reads trl>="):
        attach_credit(trainer, CoupledRhythmCredit())


def test_a_transformers_without_the_look_up_ends_in_the_sentence() -> None:
    """Before 5.4 there was no `get_interface`, which importing the adapter looks up."""
    code = (
        "import importlib.metadata as metadata, transformers\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: '5.3.0' if name == 'transformers' else real(name)\n"
        "del transformers.AttentionInterface.get_interface\n"
        "from attnprobe.errors import AttnprobeError\n"
        "try:\n"
        "    import attnprobe.adapters.transformers\n"
        "except AttnprobeError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("transformers 5.3.0 is installed, but attnprobe reads transformers>=")


@pytest.mark.parametrize(
    ("package", "versions", "said"),
    [("transformers", OLD, "not read"), ("trl", OLD, "not read"), ("torch", NEW, "not tested")],
)
def test_doctor_flags_versions(package: str, versions: dict[str, str], said: str, pretend) -> None:
    def rows() -> str:
        console = Console(width=200)
        with console.capture() as captured:
            console.print(doctor.version_table())
            console.print(doctor.backend_table())
        return captured.get()

    plain = rows()
    assert said not in plain
    assert all(range_ in plain for range_ in SUPPORTED.values())
    pretend(package, versions[package])
    (row,) = [line for line in rows().splitlines() if said in line]
    assert package in row
    assert versions[package] in row
    assert SUPPORTED[package] in row


def test_the_error_is_one_of_ours() -> None:
    assert issubclass(UnsupportedModelError, AttnprobeError)
