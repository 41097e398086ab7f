"""Budgets beyond input: replies, weights, several limits together, every group; and what is written of them."""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from scipy.stats import beta

from hhh_router.calibration import Calibrators
from hhh_router.calibration.kept import KEPT, KeptRow, read_kept, write_kept
from hhh_router.errors import DataError, PolicyError
from hhh_router.evaluation.budget import BudgetNotKept, fit_policy, worst_groups
from hhh_router.evaluation.budget_page import corners, error_rows, fit_html, fit_png, group_rows
from hhh_router.evaluation.budget_rows import FitRow, kept_replies, kept_rows
from hhh_router.evaluation.rank import rank_replies
from hhh_router.pipeline.plan import judge_output, make_plan
from hhh_router.policy import as_document, parse_policy
from hhh_router.policy.lock import Deployed, check_lock, written_into
from hhh_router.policy.schema import PASSING
from hhh_router.testing import make_scores
from hhh_router.types import Situation

HEAD = "version: 1\nname: t\nweights: {helpful: 1, harmless: 1, honest: 1}\nstrength: 0.5\n"
FLOOR = 'floors:\n  - when: {needs.harmless: ">= 0.4"}\n    raise: {harmless: 0.6}\n'
STOP = '{when: {needs.harmless: ">= 0.5"}, then: refuse}'
CUT = '{when: {outcomes.unsafe: ">= 0.5"}, then: regenerate}'
INPUT = "input: {benign_refused: 0.1, harm_passed: 0.2}"
OUTPUT = "output: {safe_withheld: 0.1, unsafe_passed: 0.2}"
WEIGHTS = "weights: {harmful_below: 0.2, benign_above: 0.1, weight: 0.5}"
CALIBRATORS = Calibrators.none()


def policy(*parts: str, output: str = CUT, level: float | None = 0.9, more: str = ""):
    budget = ", ".join([*parts, *([] if level is None else [f"level: {level}"])])
    return parse_policy(
        f"{HEAD}{FLOOR}checkpoints:\n  input:\n    - {STOP}\n    - {{then: allow}}\n"
        f"  output:\n    - {output}\n    - {{then: allow}}\nbudget: {{{budget}}}\n{more}",
        source="p.yaml",
    )


def rows(head: str, n: int = 300, *, apart: float = 3.0, groups: Sequence[str] = ("a", "b"), seed: int = 5):
    rng = random.Random(seed)
    mode = "prompt" if head.startswith("needs") else "both"
    return [
        FitRow(
            scores=dataclasses.replace(make_scores({head: rng.gauss(apart if i % 3 == 0 else -apart, 1.5)}), mode=mode),
            harmful=i % 3 == 0,
            situation=Situation(),
            group=groups[i % len(groups)],
        )
        for i in range(n)
    ]


PROMPTS, REPLIES = rows("needs.harmless"), rows("outcomes.unsafe", seed=6)


def fitted(given, prompts=PROMPTS, replies=REPLIES):
    return fit_policy(
        given, prompts, CALIBRATORS, bundle_sha256="a" * 64, data="bundle", data_sha256="b" * 64, replies=replies
    )


def withheld(given, row: FitRow) -> bool:
    """By the path that a reply takes."""
    plan = make_plan(make_scores({}), policy=given, calibrators=CALIBRATORS)
    return judge_output(row.scores, plan=plan, policy=given, calibrators=CALIBRATORS)[2].action not in PASSING


def weight(given, row: FitRow) -> float:
    return make_plan(row.scores, policy=given, calibrators=CALIBRATORS).weights["harmless"]


# -- replies ---------------------------------------------------------------------------------------------------------


def test_the_limit_at_output_keeps_its_budget_by_an_independent_count():
    found = fitted(policy(OUTPUT)).policy
    part = found.lock.parts["output"]

    safe = [withheld(found, r) for r in REPLIES if not r.harmful]
    passed = [not withheld(found, r) for r in REPLIES if r.harmful]
    assert part.errors["safe_withheld"].share == pytest.approx(sum(safe) / len(safe), abs=1e-6)
    assert part.errors["unsafe_passed"].n == len(passed)
    assert part.errors["unsafe_passed"].bound == pytest.approx(
        beta.ppf(0.95, sum(passed) + 1, len(passed) - sum(passed)), abs=1e-6
    )
    assert part.errors["safe_withheld"].bound <= 0.1
    assert part.errors["unsafe_passed"].bound <= 0.2
    assert found.checkpoints["output"][0].when[0].value == part.limit
    assert found.checkpoints["input"] == policy(OUTPUT).checkpoints["input"]


def test_replies_that_another_rule_withholds_stand_above_every_limit():
    two = CUT + "\n    - {when: {outcomes.untruthful: '>= 0.9'}, then: refuse}"
    shaky = [
        dataclasses.replace(r, scores=dataclasses.replace(r.scores, outcomes={**r.scores.outcomes, "untruthful": 5.0}))
        for r in REPLIES
    ]

    assert (rank_replies(policy(OUTPUT, output=two), shaky, CALIBRATORS).scores == 1.0).all()
    flagged = "{when: {outcomes.untruthful: '>= 0.9'}, then: flag}\n    - " + CUT
    assert (rank_replies(policy(OUTPUT, output=flagged), shaky, CALIBRATORS).scores == 0.0).all()


def test_a_rule_on_confidence_is_passed_over_behind_what_withholds_and_refused_before_it():
    behind = CUT + "\n    - {when: {confidence: '< 0.5'}, then: flag}"
    before = "{when: {confidence: '< 0.5'}, then: flag}\n    - " + CUT

    assert fitted(policy(OUTPUT, output=behind)).policy.lock.parts == fitted(policy(OUTPUT)).policy.lock.parts
    with pytest.raises(PolicyError, match="a rule at output asks for confidence"):
        fitted(policy(OUTPUT, output=before))


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("{when: {outcomes.untruthful: '>= 0.5'}, then: refuse}", "0 rules at output withhold"),
        ("{when: {outcomes.unsafe: '>= 0.5'}, then: steer}", "0 rules at output withhold"),
        (CUT + "\n    - {when: {outcomes.unsafe: '>= 0.4'}, then: refuse}", "2 rules at output withhold"),
        ("{when: {outcomes.unsafe: '>= 0.5', weights.base: '>= 0.1'}, then: refuse}", "asks for weights.base"),
    ],
)
def test_what_cannot_be_fitted_at_output_says_why(output, expected):
    with pytest.raises(PolicyError, match=expected):
        fitted(policy(OUTPUT, output=output))


def test_a_budget_for_replies_without_labelled_replies_says_so():
    with pytest.raises(DataError, match=r"budget\.output: 0 unsafe and 0 safe replies"):
        fitted(policy(OUTPUT), replies=[])


# -- weights ---------------------------------------------------------------------------------------------------------


def test_the_floors_limit_keeps_its_budget_by_an_independent_count():
    found = fitted(policy(WEIGHTS)).policy
    part = found.lock.parts["weights"]

    light = [weight(found, r) < 0.5 for r in PROMPTS if r.harmful]
    heavy = [weight(found, r) >= 0.5 for r in PROMPTS if not r.harmful]
    assert part.errors["harmful_below"].share == pytest.approx(sum(light) / len(light), abs=1e-6)
    assert part.errors["benign_above"].share == pytest.approx(sum(heavy) / len(heavy), abs=1e-6)
    assert part.errors["harmful_below"].bound <= 0.2
    assert part.errors["benign_above"].bound <= 0.1
    assert found.floors[0].when[0].value == part.limit
    assert part.strength is None


def test_the_first_strength_that_keeps_the_budget_is_taken_and_its_choice_is_paid_for():
    several = WEIGHTS.replace("}", ", strengths: [0.0, 0.5, 1.0]}")
    found = fitted(policy(several)).policy
    part = found.lock.parts["weights"]

    assert part.strength == found.strength == 0.0
    assert found.lock.level == pytest.approx(1 - 0.1 / 6, abs=1e-6)
    assert fitted(policy(WEIGHTS)).policy.lock.level == pytest.approx(0.95)
    alone = WEIGHTS.replace("}", ", strengths: [0.5]}")
    assert fitted(policy(alone)).policy.lock.parts["weights"].limit == pytest.approx(
        fitted(policy(WEIGHTS)).policy.lock.parts["weights"].limit
    )


def test_no_strength_that_keeps_the_budget_names_those_tried():
    several = "weights: {harmful_below: 0.001, benign_above: 0.001, weight: 0.5, strengths: [0.2, 0.8]}"

    with pytest.raises(BudgetNotKept, match=r"so it is at each strength of 0\.2, 0\.8"):
        fitted(policy(several))


def test_a_floor_that_does_not_reach_the_budgets_weight_is_refused():
    with pytest.raises(PolicyError, match=r"raises harmless to 0\.6, below the 0\.7"):
        fitted(policy(WEIGHTS.replace("0.5", "0.7")))


# -- several limits, and groups ----------------------------------------------------------------------------------------


def test_several_limits_share_what_the_level_leaves():
    found = fitted(policy(INPUT, OUTPUT, WEIGHTS)).policy

    assert set(found.lock.parts) == {"input", "output", "weights"}
    assert found.lock.level == pytest.approx(1 - 0.1 / 6, abs=1e-6)
    missed = found.lock.parts["input"].errors["harm_passed"]
    k = round(missed.share * missed.n)
    assert missed.bound == pytest.approx(beta.ppf(1 - 0.1 / 6, k + 1, missed.n - k), abs=1e-5)
    flat = fitted(policy("benign_refused: 0.1", "harm_passed: 0.2")).policy
    assert flat.lock.level == 0.9  # each of its two bounds
    assert flat.lock.parts["input"].errors["harm_passed"].bound <= missed.bound


def test_without_a_level_the_bounds_hold_on_average():
    found = fitted(policy(INPUT, OUTPUT, level=None)).policy
    missed = found.lock.parts["input"].errors["harm_passed"]

    assert found.lock.level is None
    assert missed.bound == pytest.approx((round(missed.share * missed.n) + 1) / (missed.n + 1), abs=1e-6)


def test_every_part_that_is_not_kept_is_told_with_what_can_be():
    tight = ("input: {benign_refused: 0.001, harm_passed: 0.001}", OUTPUT.replace("0.2", "0.001"), WEIGHTS)

    with pytest.raises(BudgetNotKept) as caught:
        fitted(policy(*tight))

    assert set(caught.value.attainable) == {"input", "output"}
    assert "harm_passed ≤ 0.001" in caught.value.message
    assert "unsafe_passed ≤ 0.001" in caught.value.message
    for points in caught.value.attainable.values():
        assert [p.falling for p in points] == sorted((p.falling for p in points), reverse=True)
        assert [p.rising for p in points] == sorted(p.rising for p in points)


def test_a_budget_for_every_group_holds_in_the_worst_one():
    hard = rows("needs.harmless", 300, apart=1.2, groups=("hard",), seed=9)
    both = [*PROMPTS, *hard]
    wide = ("input: {benign_refused: 0.5, harm_passed: 0.3}",)

    pooled = fitted(policy(*wide), prompts=both)
    each = fitted(policy(*wide, "per_group: true"), prompts=both)

    assert each.policy.lock.parts["input"].limit < pooled.policy.lock.parts["input"].limit
    assert each.policy.lock.parts["input"].errors["harm_passed"].group == "hard"
    assert each.policy.lock.level == pytest.approx(1 - 0.1 / 6)  # two bounds in each of three groups
    [worst] = [g for g in pooled.parts["input"].groups if g.group == "hard"]
    assert worst.share[1] > 0.3  # what the promise for all of them hides
    assert pooled.policy.lock.parts["input"].errors["harm_passed"].bound <= 0.3


def test_what_a_limit_promises_in_every_group_is_told_of_any_fitted_policy():
    hard = rows("needs.harmless", 300, apart=1.2, groups=("hard",), seed=9)
    both = [*PROMPTS, *hard]
    found = fitted(policy("input: {benign_refused: 0.5, harm_passed: 0.3}"), prompts=both).policy

    worst = worst_groups(found, both, CALIBRATORS)["input"]["harm_passed"]

    limit = found.lock.parts["input"].limit
    harmful = [r for r in hard if r.harmful]
    passed = sum(CALIBRATORS.evidence(r.scores).needs["harmless"] < limit for r in harmful)
    assert worst.group == "hard"
    assert worst.bound == pytest.approx(beta.ppf(1 - 0.1 / 6, passed + 1, len(harmful) - passed), abs=1e-6)
    assert worst.bound > found.lock.parts["input"].errors["harm_passed"].bound


def test_groups_that_are_too_small_for_a_promise_are_named():
    few = [dataclasses.replace(r, group="few") if i < 9 else r for i, r in enumerate(PROMPTS)]

    with pytest.raises(BudgetNotKept, match=r"in every group: .*3 harmful rows of few"):
        fitted(policy(INPUT, "per_group: true"), prompts=few)


def test_one_class_may_be_missing_from_a_group():
    benign = [dataclasses.replace(r, group="calm") for r in PROMPTS if not r.harmful]

    found = fitted(policy(INPUT, "per_group: true"), prompts=[*PROMPTS, *benign])

    [calm] = [g for g in found.parts["input"].groups if g.group == "calm"]
    assert calm.n[1] == 0
    assert calm.share[1] is None


# -- what is written -----------------------------------------------------------------------------------------------


def test_a_lock_with_every_part_survives_its_file():
    found = fitted(policy(INPUT, OUTPUT, WEIGHTS.replace("}", ", strengths: [0.3, 0.5]}"))).policy
    again = parse_policy(yaml.safe_dump(as_document(found)))

    assert (again.hash, again.lock, again.budget) == (found.hash, found.lock, found.budget)
    check_lock(again, Deployed(bundle_sha256="a" * 64, calibration_id="none", data_sha256="b" * 64))


def test_limits_strength_and_lock_are_written_into_the_files_own_text(tmp_path: Path):
    text = (
        f"# mine\n{HEAD}{FLOOR}checkpoints:\n  input:\n    - {STOP}  # stops\n    - {{then: allow}}\n  output:\n"
        f"    - {CUT}\n    - {{then: allow}}\n"
        f"budget: {{{INPUT}, {OUTPUT}, {WEIGHTS.replace('}', ', strengths: [0.2]}')}, level: 0.9}}\n"
    )
    found = fitted(parse_policy(text, source="p.yaml")).policy

    written = written_into(text, found, folder=tmp_path)

    again = parse_policy(written)
    assert again.hash == found.hash
    assert again.strength == 0.2
    assert "# mine" in written
    assert "# stops" in written
    assert written_into(written, found, folder=tmp_path) == written


def test_a_limit_that_leaves_nothing_to_a_rule_behind_it_is_told_before_anything_is_written():
    low = (
        "{when: {outcomes.unsafe: '>= 0.9'}, then: regenerate}\n    - {when: {outcomes.unsafe: '>= 0.85'}, then: steer}"
    )

    with pytest.raises(PolicyError, match=r"checkpoints\.output\[0\] leaves nothing to checkpoints\.output\[1\]"):
        fitted(policy(OUTPUT, output=low))


def test_an_earlier_lock_of_one_limit_still_stands():
    flat = fitted(policy("benign_refused: 0.1", "harm_passed: 0.2")).policy
    part, document = flat.lock.parts["input"], as_document(flat)
    del document["lock"]["input"], document["lock"]["level"]
    document["lock"] |= {"limit": part.limit}
    for name, n in (("benign_refused", "n_benign"), ("harm_passed", "n_harmful")):
        error = part.errors[name]
        document["lock"] |= {n: error.n, name: error.share, f"{name}_bound": error.bound}

    earlier = parse_policy(yaml.safe_dump(document))

    assert earlier.lock == flat.lock
    check_lock(earlier, Deployed(bundle_sha256="a" * 64, calibration_id="none", data_sha256="b" * 64))
    del document["lock"]["n_benign"]
    with pytest.raises(PolicyError, match=r"lock\.n_benign: is missing"):
        parse_policy(yaml.safe_dump(document))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("budget: {output: {safe_withheld: 0.1}}", "budget.output.unsafe_passed: is missing"),
        ("budget: {input: {benign_refused: 0.1, harm_passed: 2}}", "budget.input.harm_passed: 2 is out of range"),
        ("budget: {outputs: {safe_withheld: 0.1}}", "did you mean output?"),
        ("budget: {level: 0.1}", "budget: accepts nothing"),
        ("budget: {input: 0.1}", "budget.input: 0.1 is no mapping"),
        ("budget: {weights: {harmful_below: 0.1, benign_above: 0.1}}", "budget.weights.weight: is missing"),
        (
            "budget: {weights: {harmful_below: 0.1, benign_above: 0.1, weight: 0.5, strengths: [0.5]}}",
            "budget.weights.strengths: the rows choose one of them",
        ),
        (
            "budget: {weights: {harmful_below: 0.1, benign_above: 0.1, weight: 0.5, strengths: [7]}, level: 0.9}",
            "budget.weights.strengths[0]: 7 is out of range",
        ),
        ("budget: {benign_refused: 0.1, harm_passed: 0.1, per_group: maybe}", "budget.per_group: 'maybe'"),
    ],
)
def test_a_mistake_in_a_budget_has_its_line(text, expected):
    with pytest.raises(PolicyError) as caught:
        parse_policy(f"{HEAD}checkpoints:\n  input: [{{then: allow}}]\n  output: [{{then: allow}}]\n{text}\n")

    assert expected in caught.value.message
    assert "policy.yaml:8  " in caught.value.message


def test_page_picture_and_tables_have_every_part():
    found = fitted(policy(INPUT, OUTPUT, WEIGHTS))

    page = fit_html(found, command="hhh-router policy fit t")
    for text in ("Trade-off · input", "unsafe passed", "harmful below", "all at level 0.9, each at 0.9833"):
        assert text in page
    assert len(fit_png(found)) > len(fit_png(fitted(policy(INPUT))))
    [withheld_row, _] = error_rows(found.policy, "output")
    assert withheld_row[0] == "safe withheld"
    assert withheld_row[-1] == "0.100"
    assert [row[0] for row in group_rows(found, "output")] == ["a", "b"]
    (shown, _), _ = corners(found, "output")
    assert shown == pytest.approx(found.policy.lock.parts["output"].errors["safe_withheld"].share, abs=1e-6)


# -- kept replies --------------------------------------------------------------------------------------------------


def test_kept_replies_survive_their_file_beside_prompts(tmp_path: Path):
    scores = dataclasses.replace(make_scores({}), layers_run=0)
    kept = [
        KeptRow(source="s", needs={"harmless": 1.0}, scores=dataclasses.replace(scores, mode="prompt")),
        KeptRow(source="r", needs={}, outcomes={"unsafe": 1.0}, scores=dataclasses.replace(scores, mode="both")),
        KeptRow(source="r", needs={}, outcomes={"unsafe": 0.0}, scores=dataclasses.replace(scores, mode="response")),
    ]
    write_kept(tmp_path / KEPT, kept, heads_sha256="h")

    found = read_kept(tmp_path, heads_sha256="h")

    assert list(found.rows) == kept
    assert [r.group for r in kept_rows(found)] == ["s"]
    assert [(r.group, r.harmful) for r in kept_replies(found)] == [("r", True)]
