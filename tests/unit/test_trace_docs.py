"""The example and the snippets in the documents are what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest

from hhh_router.calibration import CalibrationFile, Calibrators, HeadCalibration, ModeCalibration
from hhh_router.routing import kl_nats, weigh
from hhh_router.trace import Metadata, build_metadata, metadata_schema
from hhh_router.trace.block import BundleRef
from hhh_router.types import (
    DIMENSIONS,
    NEEDS,
    OUTCOMES,
    Action,
    ChatRequest,
    Decision,
    Message,
    Posterior,
    Scores,
)

DOCS = Path(__file__).resolve().parents[2] / "docs"


def snippets(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), flags=re.DOTALL)


def example() -> Metadata:
    """A prompt and its reply, read, calibrated, weighed and recorded."""
    head = HeadCalibration(
        method="platt",
        params={"slope": 0.8, "intercept": -0.4},
        n=480,
        positives=160,
        nll=0.31,
        brier=0.095,
        ece=0.024,
        nll_identity=0.36,
        brier_identity=0.104,
        ece_identity=0.071,
        auroc=0.94,
    )
    mode = ModeCalibration(
        n=480,
        distance_limit=1.4,
        needs=dict.fromkeys(NEEDS, head),
        outcomes=dict.fromkeys(OUTCOMES, head),
    )
    calibrators = Calibrators(
        CalibrationFile.create(
            heads_sha256="1" * 64,
            dtype="bfloat16",
            data_sha256="2" * 64,
            seed=7,
            train_prior=Posterior(0.1, 0.5, 0.2, 0.2),
            modes={"both": mode},
        )
    )
    evidence = calibrators.evidence(
        Scores(
            mode="both",
            needs={"helpful": 2.9, "harmless": -1.8, "honest": 0.9, "injection": -3.4},
            outcomes={"unsafe": -3.6, "untruthful": -1.4, "unhelpful": -2.1},
            distance=1.02,
            tokens=87,
        )
    )
    weights = weigh(
        evidence.posterior,
        prior=dict.fromkeys(DIMENSIONS, 1.0),
        train_prior=calibrators.train_prior,
        strength=0.6,
        lower={"harmless": 0.05},
        upper={"base": 0.6},
    )
    shift = kl_nats(weights, evidence.posterior)
    limits = [(evidence.outcomes["unsafe"], 0.8)]
    return build_metadata(
        request_id="hhh-0f5c",
        policy=SimpleNamespace(name="balanced", version=1, hash="3" * 64, mode="enforce"),
        bundle=BundleRef(name="smollm2-135m", hash="4" * 64),
        backbone_sha256="5" * 64,
        calibrators=calibrators,
        evidence=evidence,
        weights=weights,
        mixture=weights.mixture,
        policy_shift_nats=shift,
        confidence=calibrators.confidence(evidence, weights=weights, policy_shift_nats=shift, limits=limits).value,
        decisions=[
            Decision(
                checkpoint="input", action=Action.ALLOW, rule="checkpoints.input[3]", reason="no other rule matched"
            ),
            Decision(
                checkpoint="output", action=Action.ALLOW, rule="checkpoints.output[3]", reason="no other rule matched"
            ),
        ],
        request=ChatRequest(messages=(Message(role="user", content="How do vaccines work?"),)),
        reply_text="They train the immune system to recognise a germ.",
        layers_run=30,
        timing_ms={"read": 41.2, "decode": 812.6, "total": 861.9},
    )


def test_the_documented_example_is_what_the_code_makes():
    [documented] = snippets("metadata.md", "json")

    assert json.loads(documented) == example().as_json()
    jsonschema.validate(json.loads(documented), metadata_schema())


def test_every_field_of_the_block_is_documented():
    text = (DOCS / "metadata.md").read_text(encoding="utf-8")
    named = [*Metadata.model_json_schema(by_alias=True)["properties"], *example().receipt.model_dump()]

    assert [name for name in named if f"`{name}`" not in text and f"`{name}." not in text] == []


@pytest.mark.parametrize("name", ["metadata.md", "calibration.md"])
def test_the_snippets_run(name):
    for code in snippets(name, "python"):
        exec(compile(code, name, "exec"), {})


def test_every_confidence_feature_is_documented():
    from hhh_router.calibration import FEATURES

    text = (DOCS / "calibration.md").read_text(encoding="utf-8")

    assert [name for name in FEATURES if f"`{name}`" not in text] == []
