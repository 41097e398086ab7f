"""The metadata block: what it holds, its hashes, its schema."""

from __future__ import annotations

import hashlib
import json
import math
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from hhh_router.calibration import Calibrators
from hhh_router.trace import Metadata, build_metadata, metadata_schema, request_sha256, text_sha256
from hhh_router.trace.block import BundleRef
from hhh_router.trace.build import round_shares
from hhh_router.types import (
    DIMENSIONS,
    OUTCOMES,
    Action,
    ChatRequest,
    Decision,
    GuardRequest,
    Message,
    Posterior,
    ReadRequest,
    Sampling,
    Scores,
    Weights,
)

POLICY = SimpleNamespace(name="balanced", version=3, hash="0123456789abcdef" * 4, mode="enforce")
BUNDLE = BundleRef(name="tiny", hash="fedcba9876543210" * 4)
WEIGHTS = Weights(0.1, 0.2, 0.3, 0.4)
ASKED = ChatRequest(messages=(Message(role="user", content="Où est Paris?"),), sampling=Sampling(seed=5))


def block(**changed: Any) -> Metadata:
    read = Scores(
        mode="both",
        needs=dict(zip(DIMENSIONS, (2.0, -1.0, 0.3), strict=True)),
        outcomes=dict(zip(OUTCOMES, (-3.0, -1.0, 0.0), strict=True)),
        distance=0.7,
        tokens=12,
    )
    calibrators = Calibrators.none()
    arguments: dict[str, Any] = {
        "request_id": "hhh-1",
        "policy": POLICY,
        "bundle": BUNDLE,
        "backbone_sha256": "aa" * 32,
        "calibrators": calibrators,
        "evidence": calibrators.evidence(read),
        "weights": WEIGHTS,
        "mixture": WEIGHTS.mixture,
        "policy_shift_nats": 0.1234567891,
        "confidence": 0.98765432199,
        "decisions": [
            Decision(checkpoint="input", action=Action.FLAG, rule="checkpoints.input[1]", reason="needs.harmless 0.7"),
            Decision(checkpoint="output", action=Action.REFUSE, rule="on_error", reason="no", message="Sorry."),
        ],
        "request": ASKED,
        "reply_text": "Sorry.",
        "not_inspected": ["messages[0].content[1]: image_url"],
        "layers_run": 30,
        "timing_ms": {"read": 1.23456, "total": 99.0},
    } | changed
    return build_metadata(**arguments)


def test_a_block_meets_the_published_schema_and_comes_back_the_same():
    made = block()
    wire = json.loads(json.dumps(made.as_json(), allow_nan=False))

    jsonschema.Draft202012Validator.check_schema(metadata_schema())
    jsonschema.validate(wire, metadata_schema())
    assert Metadata.model_validate(wire) == made


def test_the_schema_rejects_a_block_with_a_field_too_many_or_too_few():
    wire = block().as_json()

    for spoiled in (wire | {"extra": 1}, {k: v for k, v in wire.items() if k != "receipt"}, wire | {"confidence": 1.2}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spoiled, metadata_schema())


def test_the_block_has_every_field_the_design_names():
    assert set(block().as_json()) == {
        *(
            "schema",
            "request_id",
            "mode",
            "policy",
            "bundle",
            "calibration",
            "needs",
            "posterior",
            "weights",
            "mixture",
            "trajectory",
        ),
        *("policy_shift_nats", "outcomes", "confidence", "decisions", "not_inspected", "layers_run", "timing_ms"),
        "shadow",
        "redacted",
        "receipt",
    }


def test_references_show_sixteen_digits_and_the_receipt_all():
    made = block()

    assert made.policy.hash == "0123456789abcdef"
    assert made.bundle.hash == "fedcba9876543210"
    assert made.receipt.policy_sha256 == POLICY.hash
    assert made.receipt.bundle_sha256 == BUNDLE.hash
    assert made.receipt.backbone_sha256 == "aa" * 32
    assert made.receipt.calibration_id == made.calibration.id == "none"


def test_what_was_measured_decided_and_applied_is_told_as_it_was():
    made = block()

    assert made.needs["helpful"] == round(1 / (1 + math.exp(-2)), 6)
    assert made.weights == WEIGHTS.as_dict()
    assert made.mixture == "hhh@2-3-5-6"
    assert (made.confidence, made.policy_shift_nats) == (0.987654, 0.123457)
    assert [d.action for d in made.decisions] == ["flag", "refuse"]
    assert made.decisions[1].message == "Sorry."
    assert made.timing_ms == {"read": 1.235, "total": 99.0}
    assert made.not_inspected == ["messages[0].content[1]: image_url"]


@pytest.mark.parametrize(
    "shares",
    [
        Weights(1 / 3, 1 / 3, 1 / 3, 0.0),
        Weights(1 / 7, 2 / 7, 3 / 7, 1 / 7),
        Weights(0.9999999, 1e-7, 0.0, 0.0),
        Weights(1.0, 0.0, 0.0, 0.0),
        Posterior(0.9999995, 5e-7, 0.0, 0.0),
        Weights(0.25000025, 0.25000025, 0.25000025, 0.25000025),  # sums to 1.000001, as a simplex may
    ],
)
def test_rounded_shares_are_close_and_still_sum_to_one(shares):
    rounded = round_shares(shares)

    assert abs(sum(rounded.values()) - 1) <= 1e-6 + 1e-12
    assert all(abs(rounded[e] - shares[e]) <= 1e-6 for e in rounded)
    Weights.from_mapping(rounded)


@pytest.mark.parametrize("field", ["confidence", "policy_shift_nats"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_no_json_is_refused(field, value):
    with pytest.raises(ValueError, match=f"metadata {field} is {value}"):
        block(**{field: value})


def test_a_shift_that_rounding_made_negative_is_zero():
    assert block(policy_shift_nats=-1e-17).policy_shift_nats == 0.0


def test_a_chats_hash_can_be_recomputed_from_its_documentation():
    """The recipe of docs/metadata.md, written out by hand."""
    canonical = (
        '{"messages":[{"content":"O\\u00f9 est Paris?","role":"user"}],"passthrough":{},"response":null,'
        '"sampling":{"max_tokens":256,"seed":5,"stop":[],"temperature":0.0,"top_p":1.0},"weights":null}'
    )

    assert block().receipt.request_sha256 == hashlib.sha256(canonical.encode()).hexdigest()


def test_a_guard_requests_hash_covers_prompt_and_response():
    read = ReadRequest(messages=(Message(role="user", content="a"),), response="b")
    canonical = '{"messages":[{"content":"a","role":"user"}],"response":"b"}'

    assert request_sha256(GuardRequest(read=read)) == hashlib.sha256(canonical.encode()).hexdigest()
    assert request_sha256(GuardRequest(read=read)) == request_sha256(read)


def test_what_decides_the_answer_changes_the_hash_and_nothing_else_does():
    turn = Message(role="user", content="Hi")
    base = request_sha256(ChatRequest(messages=(turn,)))
    same = [
        ChatRequest(messages=(turn,), request_id="x", policy="balanced", not_inspected=("a",)),
        ChatRequest(messages=(turn,), sampling=Sampling(top_logprobs=5)),
    ]
    other = [
        ChatRequest(messages=(Message(role="system", content="Hi"),)),
        ChatRequest(messages=(turn, turn)),
        ChatRequest(messages=(turn,), sampling=Sampling(temperature=0.1)),
        ChatRequest(messages=(turn,), sampling=Sampling(top_k=1)),
        ChatRequest(messages=(turn,), sampling=Sampling(logit_bias={5: 1})),
        ChatRequest(messages=(turn,), sampling=Sampling(logit_bias={5: 2})),
        ChatRequest(messages=(turn,), sampling=Sampling(json_schema="{}")),
        ChatRequest(messages=(turn,), weights=WEIGHTS),
        ChatRequest(messages=(turn,), passthrough={"tools": []}),
    ]

    assert all(request_sha256(r) == base for r in same)
    assert len({base, *map(request_sha256, other)}) == 1 + len(other)


def test_the_replys_hash_is_of_its_utf8_bytes_and_absent_without_one():
    assert block(reply_text="é").receipt.reply_sha256 == hashlib.sha256(b"\xc3\xa9").hexdigest()
    assert block(reply_text="").receipt.reply_sha256 == hashlib.sha256(b"").hexdigest()
    assert block(reply_text=None).receipt.reply_sha256 is None


def test_half_a_surrogate_pair_can_be_hashed():
    assert len(text_sha256("\ud800")) == 64
    assert len(request_sha256(ReadRequest(response="\ud800"))) == 64
