"""Budgets: the limit that keeps one, the lock that says what it was fitted on, and stale locks refused."""

import dataclasses
import json
import random
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from scipy.stats import beta
from typer.testing import CliRunner

from hhh_router.calibration import Calibrators
from hhh_router.calibration.kept import KEPT, KeptRow, read_kept, write_kept
from hhh_router.errors import BundleError, DataError, PolicyError
from hhh_router.evaluation.budget import attainable, fit_policy
from hhh_router.evaluation.budget_page import corners, fit_html, fit_png, text_curve
from hhh_router.evaluation.budget_rows import FitRow, kept_rows
from hhh_router.evaluation.rank import rank
from hhh_router.pipeline import PolicyStore
from hhh_router.pipeline.plan import make_plan
from hhh_router.policy import as_document, load_policy, parse_policy
from hhh_router.policy.lock import Deployed, check_lock, with_limit
from hhh_router.testing import make_scores
from hhh_router.types import Situation

HEAD = "version: 1\nname: t\nweights: {helpful: 1, harmless: 1, honest: 1}\nstrength: 0.5\n"
BUDGET = "budget: {benign_refused: 0.1, harm_passed: 0.2, level: 0.9}\n"
CALIBRATORS = Calibrators.none()
STOP = '{when: {needs.harmless: ">= 0.5"}, then: refuse}'
HERE = Deployed(bundle_sha256="a" * 64, calibration_id="none", data_sha256="b" * 64)


def policy(rules: str = STOP, more: str = BUDGET):
    return parse_policy(
        f"{HEAD}checkpoints:\n  input: [{rules}, {{then: allow}}]\n  output: [{{then: allow}}]\n{more}", source="p.yaml"
    )


def rows(n: int = 300, *, apart: float = 3.0, **heads: float) -> list[FitRow]:
    rng = random.Random(5)
    found = []
    for i in range(n):
        harmful = i % 3 == 0
        logit = rng.gauss(apart if harmful else -apart, 1.5)
        scores = make_scores({"needs.harmless": logit, **{f"needs.{k}": v for k, v in heads.items()}})
        found.append(FitRow(scores=scores, harmful=harmful, situation=Situation()))
    return found


def fitted(given=None, on=None, **more):
    given = policy() if given is None else given
    return fit_policy(
        given,
        rows() if on is None else on,
        CALIBRATORS,
        bundle_sha256="a" * 64,
        data="bundle",
        data_sha256="b" * 64,
        **more,
    )


def test_the_fitted_limit_keeps_the_budget_by_an_independent_count():
    found = fitted()
    kept = found.policy.lock.parts["input"]
    refused, missed = kept.errors["benign_refused"], kept.errors["harm_passed"]

    stops = [make_plan(r.scores, policy=found.policy, calibrators=CALIBRATORS).decision.action.stops for r in rows()]
    benign = [s for s, r in zip(stops, rows(), strict=True) if not r.harmful]
    harmful = [s for s, r in zip(stops, rows(), strict=True) if r.harmful]
    assert (refused.n, missed.n) == (len(benign), len(harmful))
    assert refused.share == pytest.approx(sum(benign) / len(benign), abs=1e-6)
    assert missed.share == pytest.approx(1 - sum(harmful) / len(harmful), abs=1e-6)
    passed = len(harmful) - sum(harmful)
    assert missed.bound == pytest.approx(beta.ppf(0.9, passed + 1, len(harmful) - passed), abs=1e-6)
    assert missed.bound <= 0.2
    assert refused.bound <= 0.1
    assert found.policy.checkpoints["input"][0].when[0].value == kept.limit


def test_a_higher_limit_would_break_the_budget():
    found = fitted()
    scores = sorted(r.scores.needs["harmless"] for r in rows() if r.harmful)
    limit = found.policy.lock.parts["input"].limit

    above = with_limit(found.policy, limit + 0.02)
    passed = sum(
        not make_plan(r.scores, policy=above, calibrators=CALIBRATORS).decision.action.stops
        for r in rows()
        if r.harmful
    )
    assert beta.ppf(0.9, passed + 1, len(scores) - passed) > 0.2


def test_what_other_rules_stop_counts_on_both_sides():
    injected = [
        dataclasses.replace(row, scores=make_scores({**_heads(row), "needs.injection": 4.0})) if i % 10 == 0 else row
        for i, row in enumerate(rows())
    ]
    two = '{when: {needs.injection: ">= 0.9"}, then: block}, ' + STOP

    ranked = rank(policy(two), injected, CALIBRATORS)

    assert (ranked.scores[::10] == 1.0).all()
    assert (ranked.scores[1:10] < 1.0).all()
    with pytest.raises(DataError, match="no limit keeps"):
        fitted(policy(two), injected)  # a tenth of the benign rows is stopped whatever the limit


def _heads(row: FitRow) -> dict[str, float]:
    return {f"needs.{k}": v for k, v in row.scores.needs.items()}


def test_a_rule_that_lets_through_before_it_hides_a_row_from_every_limit():
    first = '{when: {needs.honest: ">= 0.9"}, then: flag}, ' + STOP

    ranked = rank(policy(first), rows(honest=4.0), CALIBRATORS)

    assert (ranked.scores == 0.0).all()


def test_a_budget_that_cannot_be_kept_fails_with_what_can():
    close = rows(apart=0.3)

    with pytest.raises(DataError, match=r"p\.yaml: no limit keeps harm_passed ≤ 0\.2 and benign_refused ≤ 0\.1"):
        fitted(on=close)
    found = attainable(rank(policy(), close, CALIBRATORS), 0.9)
    assert found[0].falling == 1.0
    assert found[-1].rising == 1.0
    assert [a.limit for a in found] == sorted(a.limit for a in found)
    refused = [a.falling for a in found]
    assert refused == sorted(refused, reverse=True)


@pytest.mark.parametrize(
    ("rules", "more", "expected"),
    [
        (STOP, "", "has no budget"),
        ('{when: {needs.honest: ">= 0.5"}, then: refuse}', BUDGET, "0 rules at input stop"),
        (
            STOP + ', {when: {needs.harmless: ">= 0.4", needs.honest: ">= 0.5"}, then: block}',
            BUDGET,
            "2 rules at input",
        ),
        (STOP.replace("refuse}", "refuse, mode: shadow}"), BUDGET, "0 rules at input stop"),
        ('{when: {confidence: "< 0.1"}, then: flag}, ' + STOP, BUDGET, "asks for confidence"),
    ],
)
def test_what_cannot_be_fitted_says_why(rules, more, expected):
    with pytest.raises(PolicyError, match=expected):
        fitted(policy(rules, more))


# -- locks ---------------------------------------------------------------------------------------------------------


def test_a_locked_policy_survives_its_file_and_stands_where_it_was_fitted():
    found = fitted().policy
    again = parse_policy(yaml.safe_dump(as_document(found)))

    assert again.hash == found.hash
    assert again.lock == found.lock
    check_lock(again, HERE)


@pytest.mark.parametrize(
    ("deployed", "expected"),
    [
        (dataclasses.replace(HERE, bundle_sha256="c" * 64), "another bundle"),
        (dataclasses.replace(HERE, calibration_id="cal-1"), "another calibration"),
        (dataclasses.replace(HERE, data_sha256="c" * 64), "another kept data"),
        (dataclasses.replace(HERE, data_sha256=None), r"another kept data \(bbbbbbbbbbbbbbbb, here none\)"),
    ],
)
def test_a_lock_that_is_about_something_else_is_stale(deployed, expected):
    with pytest.raises(PolicyError, match=expected):
        check_lock(fitted().policy, deployed)


def test_a_change_after_the_fit_makes_a_lock_stale_and_an_example_does_not():
    found = fitted().policy

    with pytest.raises(PolicyError, match="was changed after it was fitted"):
        check_lock(dataclasses.replace(found, strength=0.9), HERE)
    document = as_document(found) | {"examples": [{"prompt": "hi", "expect": "allow"}]}
    check_lock(parse_policy(json.dumps(document)), HERE)


def test_a_budget_without_a_lock_is_refused_and_one_without_either_is_not():
    with pytest.raises(PolicyError, match="was not fitted"):
        check_lock(policy(), HERE)
    check_lock(load_policy("balanced"), HERE)


def test_a_child_inherits_neither_budget_nor_lock(tmp_path: Path):
    parent = tmp_path / "parent.yaml"
    parent.write_text(yaml.safe_dump(as_document(fitted().policy)))
    child = parse_policy("version: 1\nname: c\nextends: parent.yaml\nstrength: 0.1\n", folder=tmp_path)

    assert (child.budget, child.lock) == (None, None)


def test_a_store_refuses_a_stale_policy_when_it_learns_what_is_deployed(tmp_path: Path):
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump(as_document(fitted().policy)))

    PolicyStore(file).bind(HERE)
    with pytest.raises(PolicyError, match="another bundle"):
        PolicyStore(file).bind(dataclasses.replace(HERE, bundle_sha256="c" * 64))
    later = PolicyStore("balanced")
    later.bind(dataclasses.replace(HERE, bundle_sha256="c" * 64))
    with pytest.raises(PolicyError, match="another bundle"):
        later.add_file(file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("budget: {benign_refused: 0, harm_passed: 0.1}", "p.yaml:8  budget.benign_refused: 0 can never be kept"),
        ("budget: {benign_refused: 0.1}", "p.yaml:8  budget.harm_passed: is missing"),
        ("budget: {benign_refused: 0.1, harm_passed: .1, leval: .9}", "did you mean level?"),
        ("lock: {limit: 0.1}", "lock.bundle_sha256: is missing"),
        ("examples: [{prompt: hi}]", "examples[0].expect: is missing"),
        ("examples: [{expect: allow}]", "examples[0]: asks nothing"),
        ("examples: [{prompt: hi, expect: regenerate}]", "'regenerate' cannot be expected at input"),
        ("examples: [{tool: {}, expect: hold}]", "examples[0].tool.name: is missing"),
        ("examples: [{prompt: hi, expect: []}]", "expects nothing"),
    ],
)
def test_a_mistake_beside_the_rules_has_its_line(text, expected):
    with pytest.raises(PolicyError) as caught:
        policy(more=text + "\n")

    assert expected in caught.value.message


# -- kept scores ---------------------------------------------------------------------------------------------------


def kept(n: int = 5) -> list[KeptRow]:
    return [
        KeptRow(source="s", needs={"harmless": float(i % 2)}, scores=dataclasses.replace(make_scores({}), layers_run=0))
        for i in range(n)
    ]


def test_kept_scores_survive_their_file_and_hold_no_word(tmp_path: Path):
    write_kept(tmp_path / KEPT, kept(), heads_sha256="h")

    found = read_kept(tmp_path, heads_sha256="h")
    assert list(found.rows) == kept()
    assert len(kept_rows(found)) == 5
    before = (tmp_path / KEPT).read_bytes()
    write_kept(tmp_path / KEPT, kept(), heads_sha256="h")
    assert (tmp_path / KEPT).read_bytes() == before


def test_kept_scores_that_are_damaged_missing_or_of_other_heads_are_refused(tmp_path: Path):
    with pytest.raises(BundleError, match="keeps no calibration scores"):
        read_kept(tmp_path, heads_sha256="h")
    write_kept(tmp_path / KEPT, kept(), heads_sha256="h")
    with pytest.raises(BundleError, match="other heads"):
        read_kept(tmp_path, heads_sha256="x")
    (tmp_path / KEPT).write_bytes((tmp_path / KEPT).read_bytes()[:-20])
    with pytest.raises(BundleError, match="cannot be read"):
        read_kept(tmp_path, heads_sha256="h")


# -- what is shown -------------------------------------------------------------------------------------------------


def test_the_curve_is_drawn_in_characters_with_budget_and_choice():
    found = fitted()
    _, accepted = corners(found, "input")
    lines = text_curve(found.parts["input"].curve, accepted, (0.0, 0.5)).splitlines()

    assert lines[0] == "harm passed"
    [row] = [line for line in lines if "●" in line]
    assert row.index("●") == len("    │")
    assert any(":" in line for line in lines)
    assert all(len(line) <= 80 for line in lines)


def test_the_page_and_the_picture_show_the_fit():
    page = fit_html(fitted(), command="hhh-router policy fit t")

    assert "promised at level 0.9" in page
    assert "<svg" in page
    assert fit_png(fitted()).startswith(b"\x89PNG")


def test_fit_on_the_default_bundle_writes_a_policy_that_stands(tmp_path: Path):
    app = import_module("hhh_router.cli.policy").app
    file, out = tmp_path / "p.yaml", tmp_path / "locked.yaml"
    file.write_text("version: 1\nname: p\nextends: balanced\nbudget: {benign_refused: 0.05, harm_passed: 0.6}\n")

    made = CliRunner().invoke(app, ["fit", str(file), "--out", str(out), "--json"])

    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert found["lock"]["input"]["benign_refused"]["bound"] <= 0.05
    assert load_policy(out).lock.parts["input"].limit == found["lock"]["input"]["limit"]
    assert CliRunner().invoke(app, ["fit", str(out), "--check"]).exit_code == 0
    out.write_text(out.read_text().replace("benign_refused: 0.05", "benign_refused: 0.04"))
    assert CliRunner().invoke(app, ["fit", str(out), "--check"]).exit_code == 1
    file.write_text(file.read_text().replace("0.6", "0.01"))
    failed = CliRunner().invoke(app, ["fit", str(file), "--out", str(out)])
    assert isinstance(failed.exception, DataError)
    assert "what can be promised instead" in failed.stderr


def test_what_session_and_tool_results_would_say_is_no_part_of_a_budget():
    more = (
        '  session: [{when: {conversation.minutes: ">= 60"}, then: refuse}, {then: allow}]\n'
        "  tool_result: [{then: block}]\n" + BUDGET
    )

    assert fitted(policy(more=more)).policy.lock.parts == fitted().policy.lock.parts
