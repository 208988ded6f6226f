"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before transformers is imported: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import jaxtyping
import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("default")
# The test processes share the cores: one thread each is faster than all of them for each.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the families that the installed transformers does not have, and say so."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from attnprobe.testing.tiny_models import FAMILIES

    lacking = set(FAMILIES) - set(CONFIG_MAPPING_NAMES)
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        for family in lacking.intersection(value for value in parameters if isinstance(value, str)):
            item.add_marker(pytest.mark.skip(f"transformers {transformers.__version__} has no {family}"))


@pytest.fixture
def as_users_call() -> Iterator[None]:
    """Turn off the shape checks that only tests have, so that our own errors are what is seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def smollm2():
    """The packaged SmolLM2-135M-Instruct with its tokenizer."""
    from attnprobe.models import load_model

    return load_model()
