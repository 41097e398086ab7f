"""The library of policies: each loads, states a budget, is locked to the default bundle, and is told about honestly."""

import json
import re
from pathlib import Path

import pytest

from hhh_router.assemble import deployed
from hhh_router.bundle import Bundle
from hhh_router.evaluation.policy_report import as_table
from hhh_router.pipeline import PolicyStore
from hhh_router.pipeline.situation import PIPELINE
from hhh_router.policy import lacking, list_library, list_policies, load_policy
from hhh_router.policy.lint import lint
from hhh_router.policy.load import policy_path
from hhh_router.policy.lock import check_lock
from hhh_router.settings import DEFAULT_BUNDLE

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "policy-library.md").read_text(encoding="utf-8")
FIGURES = json.loads((ROOT / "policies" / "library" / "figures.json").read_text(encoding="utf-8"))
NAMES = [
    "coding-agent", "creative-writing", "customer-support", "education-minors", "financial-information",
    "general-assistant", "healthcare-information", "security-research",
]  # fmt: skip


def test_there_are_eight_and_none_hides_a_shipped_one():
    assert list_library() == NAMES
    assert not set(NAMES) & set(list_policies())


@pytest.mark.parametrize("name", NAMES)
def test_each_states_a_budget_that_its_lock_keeps_on_the_default_bundle(name):
    policy = load_policy(name)

    assert policy.name == name
    assert policy.budget
    assert policy.lock
    assert set(policy.lock.parts) == set(policy.budget.most)
    for part, accepted in policy.budget.most.items():
        for name, most in accepted.items():
            assert policy.lock.parts[part].errors[name].bound <= most
    check_lock(policy, deployed(Bundle.load(DEFAULT_BUNDLE)))


@pytest.mark.parametrize("name", NAMES)
def test_each_can_be_used_here_has_examples_and_nothing_to_look_at(name):
    policy = load_policy(name)
    expected = {word for e in policy.examples for word in e.expect}

    assert lacking(policy, PIPELINE) == []
    assert len(policy.examples) >= 2
    assert expected
    assert [h for h in lint(policy) if h.code != "no-message"] == []
    assert PolicyStore(name).default.hash == policy.hash


@pytest.mark.parametrize("name", NAMES)
def test_each_keeps_its_comments_and_its_row_on_the_page(name):
    assert policy_path(name).read_text(encoding="utf-8").startswith("# ")
    assert len(re.findall(rf"^\| `{name}` \| [a-z]", PAGE, re.MULTILINE)) == 1


def test_the_pages_figures_are_those_that_were_measured_of_the_policies_as_they_are():
    assert as_table(FIGURES) in PAGE
    assert {p["name"]: p["hash"] for p in FIGURES["policies"]} == {
        name: load_policy(name).hash for name in (*list_policies(), *NAMES)
    }
