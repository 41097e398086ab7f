"""The JSON schema for editors says what the loader says."""

import jsonschema
import pytest
import yaml

from hhh_router.errors import PolicyError
from hhh_router.policy import as_document, list_library, list_policies, load_policy, parse_policy, policy_schema
from hhh_router.policy.load import policy_path

BASE = as_document(load_policy("honest-first"))


def edited(path: str, value: object) -> dict:
    document = yaml.safe_load(yaml.safe_dump(BASE))
    *parents, last = path.split("/")
    node = document
    for key in parents:
        node = node[int(key) if key.isdigit() else key]
    if value is KeyError:
        del node[last]
    else:
        node[last] = value
    return document


def loads(document: dict) -> bool:
    try:
        parse_policy(yaml.safe_dump(document))
    except PolicyError:
        return False
    return True


def fits_schema(document: dict) -> bool:
    return jsonschema.Draft202012Validator(policy_schema()).is_valid(document)


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(policy_schema())


@pytest.mark.parametrize("name", [*list_policies(), *list_library()])
def test_the_shipped_files_fit_the_schema(name):
    document = yaml.safe_load(policy_path(name).read_text())

    jsonschema.validate(document, policy_schema())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "other-name.2"),
        ("description", KeyError),
        ("strength", 0),
        ("mode", "shadow"),
        ("on_error", "open"),
        ("stream", {}),
        ("bounds", {}),
        ("floors", []),
        ("weights/base", KeyError),
        ("checkpoints/input/0/when", {"confidence": "<.5", "mode": "both", "in_distribution": True}),
        ("checkpoints/input/0/then", "block"),
        ("checkpoints/tool_call", [{"then": "allow"}]),
        ("checkpoints/input/0/when", {"language": "de"}),
        ("checkpoints/input/0/when", {"role": ["user", "tool"], "length.tokens": ">= 4000"}),
        ("checkpoints/input/0/when", {"headers.x-team": ["red*"], "time": "not in [mon-fri 09:00-17:00]"}),
        ("checkpoints/tool_call", [{"when": {"tool.arguments..amount": "> 5"}, "then": "hold"}, {"then": "allow"}]),
        ("budget", {"benign_refused": 0.02, "harm_passed": 0.1, "per_group": True}),
        (
            "budget",
            {
                "input": {"benign_refused": 0.02, "harm_passed": 0.1},
                "output": {"safe_withheld": 0.02, "unsafe_passed": 0.1},
                "weights": {"harmful_below": 0.2, "benign_above": 0.1, "weight": 0.5, "strengths": [0.5, 1]},
                "level": 0.9,
            },
        ),
        ("examples", [{"tool": {"name": "t", "arguments": {"a": 1}}, "expect": ["hold", "pass"]}]),
        ("overlays", [{"tenants": ["a*"], "bounds": {"harmless": {"min": 0.2}}, "on_error": "closed"}]),
    ],
)
def test_what_the_loader_accepts_fits_the_schema(path, value):
    document = edited(path, value)

    assert (loads(document), fits_schema(document)) == (True, True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "Other Name"),
        ("name", KeyError),
        ("name", 7),
        ("version", 0),
        ("version", "one"),
        ("version", KeyError),
        ("description", 5),
        ("strength", 1.01),
        ("strength", "0.5"),
        ("strength", True),
        ("strength", KeyError),
        ("weights", KeyError),
        ("weights/honest", KeyError),
        ("weights/honest", -1),
        ("weights/honesty", 1),
        ("mode", "observe"),
        ("on_error", "half"),
        ("stream/window_tokens", 0),
        ("stream/window_tokens", 2.5),
        ("stream/window_words", 3),
        ("bounds/base", {}),
        ("bounds/base", 0.3),
        ("bounds/base", {"min": 1.5}),
        ("bounds/nobody", {"min": 0.1}),
        ("floors/0/when", {"confidence": ">= 0.5"}),
        ("floors/0/when", {}),
        ("floors/0/raise", {}),
        ("floors/0/raise", KeyError),
        ("checkpoints", KeyError),
        ("checkpoints/input", KeyError),
        ("checkpoints/input", []),
        ("checkpoints/tool_call", [{"then": "refuse"}]),
        ("checkpoints/tool_calls", [{"then": "allow"}]),
        ("checkpoints/input/0/then", "hold"),
        ("checkpoints/input/0/then", "regenerate"),
        ("checkpoints/input/0/then", KeyError),
        ("checkpoints/input/0/message", ""),
        ("checkpoints/input/0/raise", {"harmless": 0.5}),
        ("checkpoints/input/0/when", {"needs.harmless": 0.9}),
        ("checkpoints/input/0/when", {"needs.harmless": "== 0.9"}),
        ("checkpoints/input/0/when", {"languages": "de"}),
        ("checkpoints/input/0/when", {"mode": "prompts"}),
        ("checkpoints/input/0/when", {"in_distribution": "true"}),
        ("budget", {"benign_refused": 0.02}),
        ("budget", {"benign_refused": 0.02, "harm_passed": 1}),
        ("budget", {"benign_refused": 0.02, "input": {"benign_refused": 0.02, "harm_passed": 0.1}}),
        ("budget", {"output": {"safe_withheld": 0.02}}),
        ("budget", {"input": {"safe_withheld": 0.02, "unsafe_passed": 0.1}}),
        ("budget", {"weights": {"harmful_below": 0.2, "benign_above": 0.1}, "level": 0.9}),
        ("budget", {"weights": {"harmful_below": 0.2, "benign_above": 0.1, "weight": 0.5, "strengths": [0.5]}}),
        ("budget", {"level": 0.9}),
        ("examples", [{"prompt": "hi"}]),
        ("examples", [{"expect": "allow"}]),
        ("examples", [{"tool": {"name": "t"}, "response": "r", "expect": "allow"}]),
        ("anything", 1),
    ],
)
def test_what_the_schema_rejects_the_loader_rejects(path, value):
    document = edited(path, value)

    assert (loads(document), fits_schema(document)) == (False, False)


def test_a_child_may_leave_out_what_its_parent_has():
    document = {"version": 1, "name": "child", "extends": "balanced", "strength": 0.2}

    assert (loads(document), fits_schema(document)) == (True, True)
    document.pop("extends")
    assert (loads(document), fits_schema(document)) == (False, False)
