"""Loading policies: what is accepted, what is reported, and where."""

import re
from pathlib import Path

import pytest

from hhh_router.errors import PolicyError
from hhh_router.policy import as_document, list_policies, load_policy, parse_policy, steers
from hhh_router.types import Action

GOOD = """\
version: 3
name: test
weights: {helpful: 1, harmless: 2, honest: 1}
strength: 0.5
bounds:
  harmless: {min: 0.1, max: 0.7}
floors:
  - when: {needs.harmless: ">= 0.5"}
    raise: {harmless: 0.4}
checkpoints:
  input:
    - when: {needs.harmless: ">= 0.9"}
      then: refuse
      message: "No."
    - then: allow
  output:
    - when: {outcomes.unsafe: "> .8"}
      then: regenerate
    - then: allow
"""


def mistakes(text: str | bytes) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, source="p.yaml")
    return caught.value.message.splitlines()


def edited(old: str, new: str) -> str:
    assert GOOD.count(old) >= 1
    return GOOD.replace(old, new, 1)


def test_a_good_policy_is_read_in_full():
    policy = parse_policy(GOOD, source="p.yaml")

    assert (policy.name, policy.version, policy.strength) == ("test", 3, 0.5)
    assert policy.prior == {"base": 1.0, "helpful": 1.0, "harmless": 2.0, "honest": 1.0}
    assert policy.lower["harmless"] == 0.1
    assert policy.upper["harmless"] == 0.7
    assert (policy.lower["base"], policy.upper["base"]) == (0.0, 1.0)
    assert (policy.on_error, policy.mode, policy.window_tokens) == ("closed", "enforce", 24)
    assert policy.floors[0].raises == {"harmless": 0.4}
    refuse, allow = policy.checkpoints["input"]
    assert (refuse.place, refuse.then, refuse.message) == ("checkpoints.input[0]", Action.REFUSE, "No.")
    assert str(refuse.when[0]) == "needs.harmless >= 0.9"
    assert allow.is_default


def test_a_regenerate_raises_the_remedy_of_the_outcome_it_tests():
    policy = parse_policy(GOOD)

    assert policy.checkpoints["output"][0].raises == {"harmless": 0.5}


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ('outcomes.untruthful: "> .8"', {"honest": 0.5}),
        ('outcomes.unhelpful: "> .8"', {"helpful": 0.5}),
        ('outcomes.unsafe: "> .8", outcomes.untruthful: "> .8"', {"harmless": 0.5, "honest": 0.5}),
    ],
)
def test_each_outcome_has_its_remedy(condition, expected):
    policy = parse_policy(edited('outcomes.unsafe: "> .8"', condition))

    assert policy.checkpoints["output"][0].raises == expected


def test_a_default_raise_stays_within_the_experts_maximum():
    text = edited("max: 0.7", "max: 0.45")

    assert parse_policy(text).checkpoints["output"][0].raises == {"harmless": 0.45}


def test_a_regenerate_may_say_what_it_raises():
    policy = parse_policy(edited("then: regenerate", "then: regenerate\n      raise: {harmless: 0.6, honest: 0.2}"))

    assert policy.checkpoints["output"][0].raises == {"harmless": 0.6, "honest": 0.2}


def test_a_steer_raises_as_a_regenerate_does():
    policy = parse_policy(edited("then: regenerate", "then: steer"))
    said = parse_policy(edited("then: regenerate", "then: steer\n      raise: {harmless: 0.6}"))

    assert policy.checkpoints["output"][0].raises == {"harmless": 0.5}
    assert said.checkpoints["output"][0].raises == {"harmless": 0.6}
    assert steers(policy)
    assert not steers(parse_policy(edited("", "")))


def test_every_shipped_policy_loads_under_its_own_name():
    assert list_policies() == ["balanced", "harmless-first", "helpful-first", "honest-first"]
    for name in list_policies():
        policy = load_policy(name)
        assert policy.name == name
        assert policy.description
        assert re.fullmatch("[0-9a-f]{64}", policy.hash)


def test_shipped_policies_fail_closed_and_enforce():
    for name in list_policies():
        policy = load_policy(name)
        assert (policy.on_error, policy.mode) == ("closed", "enforce")


def test_all_mistakes_are_reported_at_once_with_their_lines():
    text = """\
versoin: 1
name: Strict Policy
weights: {helpful: 1, harmles: 2, honest: .nan}
strength: 1.5
strength: 0.5
bounds: {harmless: {min: 0.8, max: 0.3}, honest: 0.2}
floors: [{when: {confidence: "> 0.4"}, raise: {honest: 2}}]
checkpoints:
  input:
    - {when: {needs.harmles: ">= 0.9"}, then: refuze}
    - {when: {needs.harmless: 0.9}, then: regenerate}
    - then: allow
    - {when: {in_distribution: no}, then: hold}
  output:
    - {when: {}, then: flag, message: "hello"}
    - {when: {confidence: "< 0.5"}, then: regenerate}
  tool_cal: [{then: allow}]
budget: {benign_refused: .1}
on_error: maybe
stream: {window_tokens: 0}
"""

    places = [re.match(r"p\.yaml:(\d+)  (\S+): ", line).groups() for line in mistakes(text)]

    assert places == [
        ("1", "file"),
        ("2", "name"),
        ("3", "weights"),
        ("3", "weights.honest"),
        ("4", "strength"),
        ("5", "file"),
        ("6", "bounds.harmless.max"),
        ("6", "bounds.honest"),
        ("7", "floors[0].when"),
        ("7", "floors[0].raise.honest"),
        ("10", "checkpoints.input[0].when"),
        ("10", "checkpoints.input[0].then"),
        ("11", "checkpoints.input[1].when.needs.harmless"),
        ("11", "checkpoints.input[1].then"),
        ("13", "checkpoints.input[3]"),
        ("13", "checkpoints.input[3].when.in_distribution"),
        ("13", "checkpoints.input[3].then"),
        ("15", "checkpoints.output[0].when"),
        ("15", "checkpoints.output[0].message"),
        ("15", "checkpoints.output"),
        ("16", "checkpoints.output[1].then"),
        ("17", "checkpoints"),
        ("18", "budget.harm_passed"),
        ("19", "on_error"),
        ("20", "stream.window_tokens"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "then: refuse",
            "then: refuze",
            "p.yaml:13  checkpoints.input[0].then: 'refuze' is not an action, did you mean refuse?; "
            "use allow, flag, refuse, escalate or block",
        ),
        (
            "strength: 0.5",
            "strenght: 0.5",
            "p.yaml:4  file: 'strenght' is not a known key, did you mean strength?; use version, name, description, "
            "extends, weights, strength, bounds, floors, checkpoints, on_error, mode, stream, overlays, budget, lock "
            "or examples",
        ),
        ("strength: 0.5\n", "", "p.yaml:1  strength: is missing; it has no default"),
        (
            "strength: 0.5",
            "strength: '0.5'",
            "p.yaml:4  strength: '0.5' is no number; a number between 0 and 1 is meant",
        ),
        (
            "strength: 0.5",
            "strength: .inf",
            "p.yaml:4  strength: .inf is not finite; a number between 0 and 1 is meant",
        ),
        ("strength: 0.5", "strength:", "p.yaml:4  strength: nothing is no number; a number between 0 and 1 is meant"),
        (
            "strength: 0.5",
            "strength: [1]",
            "p.yaml:4  strength: a list is no number; a number between 0 and 1 is meant",
        ),
        ("strength: 0.5", "strength: yes", "p.yaml:4  strength: yes is no number; a number between 0 and 1 is meant"),
        (
            "strength: 0.5",
            "strength: 1e999",
            "p.yaml:4  strength: '1e999' is out of range; a number between 0 and 1 is meant",
        ),
        (
            "version: 3",
            "version: 1.5",
            "p.yaml:1  version: 1.5 is no whole number; a whole number between 1 and 1000000000 is meant",
        ),
        (
            "name: test",
            "name: 12",
            "p.yaml:2  name: 12 is no name; use at most 64 lower-case letters, digits, '.', '_' and '-'",
        ),
        (
            "{helpful: 1, harmless: 2, honest: 1}",
            "{helpful: 0, harmless: 0, honest: 0, base: 0}",
            "p.yaml:3  weights: all are 0; give at least one expert a weight above 0",
        ),
        (
            "{min: 0.1, max: 0.7}",
            "{min: 0.8, max: 0.9}\n  base: {min: 0.3}",
            "p.yaml:6  bounds: the minima sum to 1.1, but weights sum to 1; lower one of them",
        ),
        (
            "{min: 0.1, max: 0.7}",
            "{max: 0.2}\n  base: {max: 0.2}\n  helpful: {max: 0.2}\n  honest: {max: 0.3}",
            "p.yaml:6  bounds: the maxima sum to 0.9, but weights sum to 1; raise one of them",
        ),
        (
            "{min: 0.1, max: 0.7}",
            "{min: 0.7, max: 0.1}",
            "p.yaml:6  bounds.harmless.max: 0.1 is below min 0.7; min <= max is meant",
        ),
        (
            "raise: {harmless: 0.4}",
            "raise: {harmless: 0.8}",
            "p.yaml:9  floors[0].raise.harmless: 0.8 is above bounds.harmless.max 0.7; raise the maximum or lower this",
        ),
        (
            "raise: {harmless: 0.4}",
            "raise: {harmless: 0.05}",
            "p.yaml:9  floors[0].raise.harmless: 0.05 is below bounds.harmless.min 0.1; a raise may raise, never lower",
        ),
        (
            "raise: {harmless: 0.4}",
            "raise: {harmless: 0.6, honest: 0.6}",
            "p.yaml:9  floors[0].raise: with it the minima sum to 1.2, but weights sum to 1; raise less",
        ),
        (
            '{needs.harmless: ">= 0.5"}',
            '{weights.harmless: ">= 0.5"}',
            "p.yaml:8  floors[0].when: 'weights.harmless' is not known yet when floors apply; "
            "use needs, outcomes, in_distribution or mode",
        ),
        (
            '">= 0.9"',
            '">= 1.9"',
            "p.yaml:12  checkpoints.input[0].when.needs.harmless: 1.9 is no probability or weight; compare with 0 to 1",
        ),
        (
            '">= 0.9"',
            '"> 1"',
            "p.yaml:12  checkpoints.input[0].when.needs.harmless: '> 1' can never hold; values lie between 0 and 1",
        ),
        (
            'needs.harmless: ">= 0.9"',
            'language: ">= 0.9"',
            "p.yaml:12  checkpoints.input[0].when.language: '>= 0.9' is no name; use 1 to 200 characters, "
            "no comparison, without brackets, commas and line breaks",
        ),
        (
            'needs.harmless: ">= 0.9"',
            'needs: {harmless: ">= 0.9"}',
            "p.yaml:12  checkpoints.input[0].when: 'needs' is a group; name one of it with a dot, like needs.helpful",
        ),
        (
            'needs.harmless: ">= 0.9"',
            "mode: prompts",
            "p.yaml:12  checkpoints.input[0].when.mode: 'prompts' is not a mode, did you mean prompt?; "
            "use prompt, response or both",
        ),
        (
            "then: refuse",
            "then: hold",
            "p.yaml:13  checkpoints.input[0].then: 'hold' belongs to the checkpoint tool_call; "
            "use allow, flag, refuse, escalate or block",
        ),
        (
            "then: refuse",
            "then: regenerate",
            "p.yaml:13  checkpoints.input[0].then: 'regenerate' belongs to the checkpoint output, there is no reply "
            "yet; use allow, flag, refuse, escalate or block",
        ),
        (
            "then: refuse",
            "then: steer",
            "p.yaml:13  checkpoints.input[0].then: 'steer' belongs to the checkpoint output, there is no reply "
            "yet; use allow, flag, refuse, escalate or block",
        ),
        (
            "then: regenerate",
            'then: steer\n      message: "x"',
            "p.yaml:19  checkpoints.output[0].message: nobody would see it, steer lets the reply through; remove it",
        ),
        (
            "    - then: allow\n  output",
            "  output",
            "p.yaml:12  checkpoints.input: no default rule; "
            "end the list with one that has no 'when', like {then: allow}",
        ),
        (
            "    - then: allow\n  output",
            "    - then: allow\n    - then: flag\n  output",
            "p.yaml:16  checkpoints.input[2]: is never reached, checkpoints.input[1] has no conditions; "
            "put the default rule last",
        ),
        (
            '      message: "No."',
            "      message: 7",
            "p.yaml:14  checkpoints.input[0].message: 7 is no text; write it in quotes",
        ),
        (
            '      message: "No."',
            '      message: "a\\ab"',
            "p.yaml:14  checkpoints.input[0].message: holds the control character U+0007; remove it",
        ),
        (
            '      message: "No."',
            "      raise: {harmless: 0.5}",
            "p.yaml:14  checkpoints.input[0].raise: refuse changes no weights; "
            "only steer and regenerate (at output) have a raise",
        ),
        (
            'outcomes.unsafe: "> .8"',
            'confidence: "< .8"',
            "p.yaml:18  checkpoints.output[0].then: regenerate needs to know what to raise; "
            "add raise: {harmless: 0.6}, or test an outcome",
        ),
        ("name: test", "name: test\nname: again", "p.yaml:3  file: 'name' is here twice (first in line 2); keep one"),
        ("name: test", "name: &n test", "p.yaml:2  file: anchor &n; write values out, policies have no anchors"),
        ("name: test", "name: !!str test", "p.yaml:2  file: tag 'tag:yaml.org,2002:str'; write the plain value"),
        (
            "name: test",
            "name: test\n<<: {a: 1}",
            "p.yaml:3  file: merge key '<<'; write the values out, or use extends",
        ),
        (
            "name: test",
            "name: test\n? [a, b]\n: 1",
            "p.yaml:3  file: a key that is a list or mapping; keys are words",
        ),
        (
            "checkpoints:\n",
            "checkpoints:\n  sesion: [{then: allow}]\n",
            "p.yaml:11  checkpoints: 'sesion' is not a known checkpoint, did you mean session?; use input, output, "
            "tool_call, tool_result or session",
        ),
        ("strength: 0.5", "strength: 0.5\nextends: nowhere", None),
    ],
)
def test_one_mistake_gives_exactly_one_line(old, new, expected):
    found = mistakes(edited(old, new))

    assert len(found) == 1
    if expected is not None:
        assert found == [expected]


def test_a_policy_that_extends_nothing_known_names_the_shipped_ones():
    [line] = mistakes(edited("name: test", "name: test\nextends: nowhere"))

    assert line.startswith("p.yaml:3  extends: 'nowhere' is no policy; use balanced, harmless-first, ")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "p.yaml:1  file: the file is empty; a policy starts with version, name, weights"),
        (b"# nothing\n", "p.yaml:1  file: the file is empty; a policy starts with version, name, weights"),
        (b"version: 1\nname: \xff\n", "p.yaml:2  file: byte 0xff is not UTF-8; save the file as UTF-8 text"),
        (b"version: 1\nname: \x01\n", "p.yaml:2  file: character U+0001 is not allowed in YAML; remove it"),
        (b"version: 1\nbounds:\n\tbase: 1\n", "p.yaml:3  file: a tab in the indentation; indent with spaces"),
        (
            b'version: 1\nname: "\\U00110000"\n',
            "p.yaml:2  file: an escape that is no character; write the character itself",
        ),
        (b"[" * 50_000, "p.yaml:1  file: no YAML: nested deeper than 16 levels; correct the syntax"),
        (b"a" * 300_000, "p.yaml:1  file: 262,145 bytes; a policy has at most 262,144"),
        (
            b"version: 1\nstrength: >= 0.9\n",
            "p.yaml:2  file: no YAML: while scanning a block scalar, expected chomping or indentation indicators, "
            "but found '='; put comparisons in quotes",
        ),
        (
            b"a: 1\n---\nb: 2\n",
            "p.yaml:2  file: no YAML: expected a single document in the stream, but found another document; "
            "correct the syntax",
        ),
    ],
)
def test_what_is_no_yaml_is_one_line(raw, expected):
    if len(raw) > 262_144:
        raw = raw[:262_145]

    assert mistakes(raw) == [expected]


@pytest.mark.parametrize("text", ["just words", "- a\n- b", "7", "null"])
def test_a_document_that_is_no_mapping_is_reported(text):
    [line] = mistakes(text)

    assert line.startswith("p.yaml:1  file: ")
    assert "is no mapping; write keys: version, name" in line


def test_an_alias_bomb_is_refused_without_being_unfolded():
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))

    found = mistakes(bomb)

    assert sum("alias *" in line for line in found) == 11  # one for each line that has any
    assert sum("anchor &" in line for line in found) == 12


def test_messages_may_hold_any_writing_system():
    text = edited('message: "No."', 'message: "Désolé : je ne peux pas. 対応できません。 👩‍🚀"')

    assert parse_policy(text).checkpoints["input"][0].message == "Désolé : je ne peux pas. 対応できません。 👩‍🚀"


def test_layout_and_comments_do_not_change_the_hash_and_content_does():
    same = "# a comment\n" + GOOD.replace(
        "{helpful: 1, harmless: 2, honest: 1}", "\n  honest: 1.0\n  harmless: 2\n  helpful: 1"
    )
    same = same.replace('">= 0.9"', '">=0.90"').replace("strength: 0.5", "strength: 5e-1\non_error: closed")

    assert parse_policy(same).hash == parse_policy(GOOD).hash
    assert parse_policy(edited(">= 0.9", ">= 0.91")).hash != parse_policy(GOOD).hash
    assert parse_policy(edited("No.", "No!")).hash != parse_policy(GOOD).hash


def test_the_full_form_of_a_policy_is_the_same_policy():
    import yaml

    for name in list_policies():
        policy = load_policy(name)
        again = parse_policy(yaml.safe_dump(as_document(policy), allow_unicode=True))
        assert again.hash == policy.hash


def test_a_policy_extends_a_shipped_one_key_by_key():
    child = parse_policy(
        "version: 7\nname: mine\nextends: balanced\nweights: {honest: 3}\nbounds: {base: {min: 0.1}}\n"
        "checkpoints:\n  input: [{then: allow}]\n"
    )
    parent = load_policy("balanced")

    assert (child.name, child.version, child.description) == ("mine", 7, None)
    assert child.prior == {**parent.prior, "honest": 3.0}
    assert child.lower == {**parent.lower, "base": 0.1}
    assert child.upper == parent.upper
    assert len(child.checkpoints["input"]) == 1  # lists are replaced whole
    assert child.checkpoints["output"] == parent.checkpoints["output"]
    assert child.floors == parent.floors
    assert child.hash != parent.hash


def test_a_policy_extends_a_file_beside_it(tmp_path: Path):
    (tmp_path / "parent.yaml").write_text(GOOD)
    (tmp_path / "child.yaml").write_text("version: 1\nname: child\nextends: parent.yaml\nstrength: 0.9\n")

    child = load_policy(tmp_path / "child.yaml")

    assert (child.name, child.strength, child.lower["harmless"]) == ("child", 0.9, 0.1)


def test_a_mistake_in_the_parent_is_reported_in_the_parent(tmp_path: Path):
    (tmp_path / "parent.yaml").write_text(edited("strength: 0.5", "strength: 5"))
    (tmp_path / "child.yaml").write_text("version: 1\nname: child\nextends: parent.yaml\nmode: never\n")

    with pytest.raises(PolicyError) as caught:
        load_policy(tmp_path / "child.yaml")

    child, parent = caught.value.message.splitlines()
    assert child.startswith(f"{tmp_path / 'child.yaml'}:4  mode: 'never' is not known")
    assert parent.startswith(f"{tmp_path / 'parent.yaml'}:4  strength: 5 is out of range")


def test_extends_goes_one_level(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("version: 1\nname: a\nextends: balanced\n")
    (tmp_path / "b.yaml").write_text("version: 1\nname: b\nextends: a.yaml\n")
    (tmp_path / "self.yaml").write_text("version: 1\nname: self\nextends: self.yaml\n")

    assert load_policy(tmp_path / "a.yaml").name == "a"
    for name in ("b.yaml", "self.yaml"):
        with pytest.raises(PolicyError, match=r"itself extends another; one level is meant"):
            load_policy(tmp_path / name)


@pytest.mark.parametrize("parent", ["missing.yaml", "[]", "''", '"a\\0.yaml"'])
def test_a_parent_that_cannot_be_had_is_one_line(tmp_path: Path, parent):
    (tmp_path / "c.yaml").write_text(f"version: 1\nname: c\nextends: {parent}\n")

    with pytest.raises(PolicyError) as caught:
        load_policy(tmp_path / "c.yaml")

    [line] = caught.value.message.splitlines()
    assert line.startswith(f"{tmp_path / 'c.yaml'}:3  extends: ")


def test_an_unknown_name_is_answered_with_the_nearest_one():
    with pytest.raises(PolicyError, match=r"'balancd' not found.*did you mean balanced\?"):
        load_policy("balancd")


@pytest.mark.parametrize("source", ["no/such/file.yaml", "nothing.yaml", "x" * 5000, "a\0b", "", "."])
def test_what_is_no_policy_at_all_is_a_policy_error(source):
    with pytest.raises(PolicyError):
        load_policy(source)


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path):
    with pytest.raises(PolicyError, match=r"none\.yaml:1  file: cannot be read \(No such file or directory\)"):
        load_policy(tmp_path / "none.yaml")
    with pytest.raises(PolicyError, match=r"cannot be read \(Is a directory\)"):
        load_policy(tmp_path)


def test_a_byte_order_mark_and_windows_line_ends_are_accepted():
    raw = b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()

    assert parse_policy(raw).hash == parse_policy(GOOD).hash
