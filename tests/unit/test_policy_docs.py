"""docs/policies.md says what the loader does."""

import re
from pathlib import Path

import pytest

from hhh_router.policy import list_policies, load_policy, parse_policy
from hhh_router.policy.rules import QUANTITIES
from hhh_router.policy.schema import ACTIONS, ERRORS, SEVERITY
from hhh_router.types import Action

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")


def table(heading: str) -> dict[str, list[str]]:
    """The rows below a heading: what stands in backticks in the first cell → the other cells."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    return {row[0].strip("`"): row[1:] for row in rows if row[0].startswith("`")}


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(version:.*?)```", PAGE, re.DOTALL))
def test_every_example_is_a_valid_policy(text):
    assert parse_policy(text).name


def test_every_condition_has_its_row():
    assert list(table("Conditions")) == list(QUANTITIES)


def test_every_action_has_its_row_and_its_checkpoints():
    found = {action: row[0].split(", ") for action, row in table("Actions").items()}

    assert found == {str(a): [c for c in ACTIONS if a in ACTIONS[c]] for a in SEVERITY}
    assert list(found) == [str(a) for a in sorted(SEVERITY, key=SEVERITY.__getitem__)]
    assert set(SEVERITY) == set(Action)


def test_the_table_of_shipped_policies_has_their_numbers():
    rows = table("The shipped ones")

    assert sorted(rows) == list_policies()
    for name, (prior, strength, refuses, _) in rows.items():
        policy = load_policy(name)
        shown = [float(x) for x in prior.split(",")[0].split(" · ")]
        assert shown == [policy.prior[e] for e in ("helpful", "harmless", "honest", "base")]
        assert float(strength) == policy.strength
        assert float(refuses) == policy.checkpoints["input"][0].when[0].value


def test_every_error_of_a_budget_is_explained():
    section = PAGE.split("\n## Budgets\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?:`(\w+)`)? ?\| `(\w+)` \|", section, re.MULTILINE)
    found: dict[str, list[str]] = {}
    for part, error in rows:
        found.setdefault(part or list(found)[-1], []).append(error)

    assert {part: tuple(errors) for part, errors in found.items()} == dict(ERRORS)
