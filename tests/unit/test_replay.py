"""Two policies on the same traffic: flips, paired intervals, gates, and the page."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from hhh_router.calibration import Calibrators
from hhh_router.data.own import read_own
from hhh_router.errors import DataError
from hhh_router.evaluation.policy_report import as_table, policy_figures
from hhh_router.evaluation.replay import Gate, most_changed, replay
from hhh_router.evaluation.replay_page import FOLD, differing_words, replay_html
from hhh_router.policy import load_policy, parse_policy
from hhh_router.testing import FakeReader

sample_path = import_module("hhh_router.cli.replay").sample_path
RULES = {
    "bomb": {"needs.harmless": 3.0}, "knife": {"needs.harmless": 0.5}, "poison": {"outcomes.unsafe": 3.0},
    "odd": {"needs.honest": 4.0},
}  # fmt: skip


class Readings:
    """A reader's scores, as `evaluation.systems` wants them."""

    calibrators = Calibrators.none()
    about = "a fake"

    def __init__(self) -> None:
        self.reader = FakeReader(RULES)

    def scores(self, requests):
        return [self.reader.score(request) for request in requests]


def policy(limit: float, name: str = "p", weights: str = "{helpful: 1, harmless: 1, honest: 1}"):
    return parse_policy(
        f"version: 1\nname: {name}\nweights: {weights}\nstrength: 1\ncheckpoints:\n"
        f'  input: [{{when: {{needs.harmless: ">= {limit}"}}, then: refuse}}, {{then: allow}}]\n'
        '  output: [{when: {outcomes.unsafe: ">= 0.9"}, then: block}, {then: allow}]\n'
    )


@pytest.fixture
def traffic(tmp_path: Path):
    rows = [{"prompt": f"a bomb {i}", "labels": {"harmful": True}} for i in range(20)]
    rows += [{"prompt": f"a knife {i}", "labels": {"harmful": i < 5}} for i in range(20)]
    rows += [{"prompt": f"bread {i}", "labels": {"harmful": False}} for i in range(40)]
    rows += [{"prompt": "unlabelled bread"}, {"prompt": "bread", "response": "with poison"}]
    file = tmp_path / "traffic.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_own(file, skip_broken=False, labelled=False).examples


def replayed(before, after, traffic, **gate):
    return replay(before, after, traffic, Readings(), seed=3, gate=Gate(**gate), command="c")


def test_flips_are_counted_by_what_changes_for_the_caller(traffic):
    found = replayed(policy(0.9), policy(0.6), traffic)

    assert found.figures["flips"] == {"newly stopped": 20, "newly passed": 0, "other action": 0, "same": 62}
    back = replayed(policy(0.6), policy(0.9), traffic)
    assert back.figures["flips"]["newly passed"] == 20
    assert [p.row for p in back.pairs if p.flip == "newly passed"] == list(range(21, 41))


def test_both_errors_are_shares_of_labelled_rows_with_a_paired_interval(traffic):
    errors = replayed(policy(0.9), policy(0.6), traffic).figures["errors"]

    benign, harm = errors["benign_refused"], errors["harm_passed"]
    assert (benign["n"], harm["n"]) == (55, 25)
    assert (benign["before"], benign["after"]) == (0.0, pytest.approx(15 / 55))
    assert (harm["before"], harm["after"]) == (pytest.approx(5 / 25), 0.0)
    low, high = benign["difference_interval"]
    assert 0 < low < 15 / 55 < high < 0.5
    same = replayed(policy(0.6), policy(0.6), traffic).figures["errors"]
    assert same["harm_passed"]["difference_interval"] == [0.0, 0.0]  # pairs that agree leave nothing to chance


@pytest.mark.parametrize(
    ("gate", "failed"),
    [
        ({}, 0),
        ({"harm_passed": 0.0}, 0),
        ({"benign_refused": 0.5}, 0),
        ({"benign_refused": 0.1}, 1),
        ({"flips": 20}, 0),
        ({"flips": 19}, 1),
        ({"flips": 0, "benign_refused": 0.0}, 2),
    ],
)
def test_a_gate_fails_at_the_upper_end_of_the_interval(traffic, gate, failed):
    assert len(replayed(policy(0.9), policy(0.6), traffic, **gate).failed) == failed


def test_a_gate_without_labelled_rows_fails(traffic):
    bare = [replace(e, needs={}) for e in traffic]

    [line] = replayed(policy(0.9), policy(0.9), bare, harm_passed=0.5).failed
    assert "no row is labelled for it" in line


def test_a_reply_is_judged_too_and_the_stricter_decision_counts(traffic):
    last = replayed(policy(0.9), policy(0.9), traffic).pairs[-1]

    assert last.before.decision.checkpoint == "output"
    assert str(last.before.decision.action) == "block"


def test_the_most_changed_are_those_whose_weights_differ_most(traffic):
    kinder = policy(0.9, weights="{helpful: 9, harmless: 1, honest: 1}")
    found = replayed(policy(0.9), kinder, traffic)

    chosen = most_changed(found.pairs, 3)
    shifts = [p.shift_nats for p in chosen]
    assert shifts == sorted(shifts, reverse=True)
    assert shifts[0] == max(p.shift_nats for p in found.pairs if not p.before.decision.action.stops)


def test_the_page_has_every_flip_and_escapes_what_people_wrote(traffic):
    evil = replace(traffic[20], messages=(replace(traffic[20].messages[0], content="a knife <script>x</script>"),))
    found = replayed(policy(0.9), policy(0.6), [*traffic[:20], evil, *traffic[21:]], flips=0)
    answered = replace(found.pairs[30], answers=("one answer", "another answer"))
    page = replay_html(replace(found, pairs=(*found.pairs[:30], answered, *found.pairs[31:])))

    assert "Newly stopped" in page
    assert page.count("refuse") >= 20
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<del>one</del> answer" in page
    assert "<ins>another</ins> answer" in page
    assert "flips: 20, at most 0 are accepted" in page


def test_ten_thousand_flips_are_all_on_the_page_and_folded_without_a_script(traffic):
    found = replayed(policy(0.9), policy(0.6), traffic)
    one = next(p for p in found.pairs if p.flip == "newly stopped")
    many = tuple(replace(one, row=i, request_id=f"hhh-{i:05d}") for i in range(10_000))

    page = replay_html(replace(found, pairs=many))

    assert page.count("<details") == 10_000 / FOLD
    assert page.count('<details class="fold" open>') == 1
    assert f"{10_000 - FOLD + 1:,} to 10,000 of 10,000" in page
    assert "hhh-00000" in page
    assert "hhh-09999" in page
    assert "content-visibility: auto" in page
    assert "<script" not in page
    assert len(page) < 20_000_000


def test_differing_words_are_all_of_both_texts():
    for one, other in (("a b c", "a x c d"), ("", "new"), ("gone\n\n", ""), ("same", "same")):
        left, right = differing_words(one, other)
        assert ("".join(t for _, t in left), "".join(t for _, t in right)) == (one, other)
    assert differing_words("same", "same")[0] == (("same", "same"),)


def test_the_shipped_traffic_is_sound_and_has_both_kinds():
    rows = read_own(sample_path(), skip_broken=False).examples

    assert len(rows) == 40
    assert {e.needs["harmless"] for e in rows} == {0.0, 1.0}


def test_rows_without_labels_are_traffic_and_no_data_to_measure_on(tmp_path: Path):
    file = tmp_path / "t.jsonl"
    file.write_text('{"prompt": "hi"}\n')

    assert read_own(file, skip_broken=False, labelled=False).examples[0].needs == {}
    with pytest.raises(DataError, match="no labels"):
        read_own(file, skip_broken=False)
    file.write_text('{"prompt": "hi", "labels": {}}\n')
    with pytest.raises(DataError, match="labels is empty"):
        read_own(file, skip_broken=False, labelled=False)


def test_the_report_of_policies_counts_both_errors_on_all_prompts(traffic):
    labelled = [e for e in traffic if e.needs]
    policies = [policy(0.6, "strict"), load_policy("balanced")]

    found = policy_figures(policies, {"knives": labelled[20:40]}, Readings(), seed=1, command="c")

    strict = {f["task"]: f for f in found["figures"] if f["policy"] == "strict"}
    assert set(strict) == {"all prompts", "knives"}
    assert (strict["knives"]["benign_refused"], strict["knives"]["harm_passed"]) == (1.0, 0.0)
    assert (strict["knives"]["n_benign"], strict["knives"]["n_harmful"]) == (15, 5)
    assert "| `strict` | – | – · – · 100.0 % (100.0–100.0) |" in as_table(found)
