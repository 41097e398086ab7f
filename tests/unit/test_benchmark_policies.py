"""The benchmark of policies runs as a whole and writes what it promises. Timings are never judged."""

import json
import math
from pathlib import Path

from benchmarks import policies
from hhh_router.policy import decide, parse_policy

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_every_rule_is_asked():
    policy = parse_policy(policies.policy_text(policies.RULES))

    assert len(policy.checkpoints["input"]) == policies.RULES
    assert decide(policy, "input", policies.facts()).rule == f"checkpoints.input[{policies.RULES - 1}]"


def test_a_quick_run_writes_each_figure_with_its_command_and_the_page_has_its_row(tmp_path: Path):
    out = tmp_path / "policies.json"

    assert policies.main(["--quick", "--out", str(out)]) == 0

    found = json.loads(out.read_text())
    names = ["decide", "reload", "fit", "fit-whole", "candidate", "again"]
    assert [r["name"] for r in found] == [f"policy-{name}" for name in names]
    for r in found:
        assert math.isfinite(r["value"])
        assert r["value"] > 0 or r["name"] == "policy-candidate"  # a difference, which noise can turn
        assert (r["n"], r["command"]) == (1, "python -m benchmarks.policies --quick")
        assert PAGE.count(f"| `{r['name']}` |") == 1
