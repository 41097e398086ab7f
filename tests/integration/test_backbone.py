"""The default backbone, as it stands in the cache; fetched and converted first where it does not."""

import json

import pytest

from hhh_router.bundle import BackboneSpec
from hhh_router.model.fetch import (
    BACKBONE_RECORD,
    DEFAULT_SHA256,
    DEFAULT_SOURCE,
    backbone_problems,
    backbone_status,
    fetch_backbone,
)
from hhh_router.settings import Settings

pytestmark = pytest.mark.integration

SPEC = BackboneSpec(
    source=DEFAULT_SOURCE,
    sha256=DEFAULT_SHA256,
    architecture="llama",
    layers=30,
    hidden_size=576,
    licence="Apache-2.0",
)


def test_the_default_backbone_is_whole_and_in_the_precision_asked_for() -> None:
    from safetensors import safe_open

    cache = Settings.load().cache_dir

    folder = fetch_backbone(SPEC, cache)

    assert backbone_status(SPEC, cache).present
    assert backbone_problems(SPEC, cache) == []
    assert json.loads((folder / BACKBONE_RECORD).read_text())["sha256"] == DEFAULT_SHA256
    with safe_open(folder / "model.safetensors", "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  # safe_open is no mapping
    assert kinds == {"BF16"}


def test_its_tokenizer_has_a_chat_template_and_survives_a_round_trip() -> None:
    from transformers import AutoTokenizer

    folder = fetch_backbone(SPEC, Settings.load().cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )

    assert shown.endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer(shown)["input_ids"]) == shown
