"""Shared by the integration tests: tiny bundles, made once per run."""

from pathlib import Path

import pytest

from hhh_router.bundle import Bundle
from hhh_router.testing.tiny import tiny_bundle

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6},
}


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def any_tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny bundle of every supported family in turn."""
    return tiny_bundle(tmp_path_factory.mktemp(request.param), family=request.param, **FAMILIES[request.param])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny Llama bundle."""
    return tiny_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def copy_of_tiny(tiny: Bundle, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    import shutil

    shutil.copytree(tiny.root, tmp_path / "bundle")
    return tmp_path / "bundle"
