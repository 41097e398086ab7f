"""A user's own JSON Lines file: what is read, what is refused, and how a mistake is told."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hhh_router.data import own
from hhh_router.data.examples import data_hash
from hhh_router.data.own import MAX_LINE_BYTES, NEED_LABELS, OUTCOME_LABELS, read_own
from hhh_router.errors import DataError
from hhh_router.types import NEEDS, OUTCOMES, Message

GOOD = {"prompt": "How do I kill a process?", "labels": {"harmful": False, "helpful": True}}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_lines(*lines: Any, name: str = "mine.jsonl", newline: bytes = b"\n") -> Path:
        path = tmp_path / name
        content = b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + newline for x in lines)
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write_lines


def labelled(prompt: str, **labels: object) -> dict[str, Any]:
    return {"prompt": prompt, "labels": labels}


def complaint(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_own(path, skip_broken=False)
    return caught.value.message


# --- what is read ---


def test_the_labels_are_the_heads_under_the_names_users_know() -> None:
    assert sorted(NEED_LABELS.values()) == sorted(NEEDS)
    assert sorted(OUTCOME_LABELS) == sorted(OUTCOMES)


def test_a_row_becomes_an_example_with_its_labels_as_needs_and_outcomes(write: Write) -> None:
    path = write(
        {
            "prompt": "Is it raining?",
            "response": "It always rains.",
            "labels": {
                "harmful": False, "injection": False, "honest": True, "helpful": True,
                "unsafe": False, "untruthful": True, "unhelpful": False,
            },
        }
    )  # fmt: skip

    (example,) = read_own(path, skip_broken=False).examples

    assert example.source == "own"
    assert example.messages == (Message(role="user", content="Is it raining?"),)
    assert example.response == "It always rains."
    assert example.needs == {"harmless": 0.0, "injection": 0.0, "honest": 1.0, "helpful": 1.0}
    assert example.outcomes == {"unsafe": 0.0, "untruthful": 1.0, "unhelpful": 0.0}
    assert (example.weight, example.answer_side) == (1.0, False)


def test_a_harmful_prompt_is_one_that_needs_harmless(write: Write) -> None:
    (example,) = read_own(write(labelled("x", harmful=True)), skip_broken=False).examples

    assert example.needs == {"harmless": 1.0}
    assert example.outcomes == {}
    assert example.response is None


def test_a_prompt_may_be_a_conversation(write: Write) -> None:
    turns = [
        {"role": "system", "content": "You sell shoes."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": ""},  # called a tool and said nothing
        {"role": "tool", "content": "3 pairs left"},
    ]

    (example,) = read_own(write({"prompt": turns, "labels": {"injection": False}}), skip_broken=False).examples

    assert [(m.role, m.content) for m in example.messages] == [(t["role"], t["content"]) for t in turns]


@pytest.mark.parametrize(
    ("more", "group"),
    [({}, ""), ({"group": "billing"}, "billing"), ({"language": "de"}, "de"),
     ({"language": "de", "group": "billing"}, "billing · de")],
)  # fmt: skip
def test_group_and_language_make_the_subgroup(write: Write, more: dict[str, str], group: str) -> None:
    (example,) = read_own(write(GOOD | more), skip_broken=False).examples

    assert example.group == group


def test_rows_are_kept_out_of_training_until_the_caller_says_otherwise(write: Write) -> None:
    path = write(GOOD)

    assert read_own(path, skip_broken=False).examples[0].split == "eval"
    assert read_own(path, skip_broken=False, split="train").examples[0].split == "train"


def test_order_is_kept_and_blank_lines_are_passed_over(write: Write) -> None:
    path = write(labelled("one", honest=True), b"", b"  \t", labelled("two", honest=False))

    read = read_own(path, skip_broken=False)

    assert [e.prompt for e in read.examples] == ["one", "two"]
    assert read.broken == []


def test_the_last_line_needs_no_newline(write: Write) -> None:
    path = write(GOOD)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))

    assert len(read_own(path, skip_broken=False).examples) == 1


def test_only_a_newline_ends_a_row(write: Write) -> None:
    text = "one\u2028two\u0085three\x0bfour"
    path = write(json.dumps(labelled(text, honest=True), ensure_ascii=False).encode())

    assert [e.prompt for e in read_own(path, skip_broken=False).examples] == [text]


def test_gzip_windows_line_ends_and_a_byte_order_mark_change_nothing(write: Write) -> None:
    rows = (GOOD, labelled("Schöne Grüße 👋", honest=True))
    plain = data_hash(read_own(write(*rows), skip_broken=False).examples)

    zipped = read_own(write(*rows, name="renamed.jsonl.gz"), skip_broken=False)
    windows = read_own(write(*rows, name="w.jsonl", newline=b"\r\n"), skip_broken=False)
    marked = read_own(write(b"\xef\xbb\xbf" + json.dumps(rows[0]).encode(), rows[1], name="m.jsonl"), skip_broken=False)

    assert {data_hash(r.examples) for r in (zipped, windows, marked)} == {plain}


def test_a_byte_order_mark_is_dropped_at_the_start_of_the_file_alone(write: Write) -> None:
    path = write(GOOD, b"\xef\xbb\xbf" + json.dumps(GOOD).encode())

    assert "mine.jsonl:2: not JSON" in complaint(path)


# --- what is refused ---


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"prompt": a}', "not JSON (Expecting value at character 11)"),
        (b"[1, 2]", "a list; a JSON object is expected"),
        (b'"text"', "a text; a JSON object is expected"),
        (b"NaN", "a number; a JSON object is expected"),
        (b"null", "null; a JSON object is expected"),
        (b'{"prompt": "\xe4"}', "byte 12 (0xe4) is not UTF-8"),
        (json.dumps(GOOD).encode("utf-16-le"), "a NUL byte at byte 1; text in UTF-8 is expected"),
        (b'{"prompt": "a", "prompt": "b"}', 'the key "prompt" stands twice'),
        (b'{"prompt": "a", "labels": {"harmful": true, "harmful": false}}', 'the key "harmful" stands twice'),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": ' + b"9" * 5_000 + b"}", "not JSON (Exceeds the limit"),
    ],
    ids=["bare word", "list", "text", "nan", "null", "latin-1", "utf-16", "key twice", "label twice", "deep", "digits"],
)
def test_a_line_that_is_no_object_is_named_with_file_and_line(write: Write, line: bytes, told: str) -> None:
    path = write(GOOD, b"", line)

    message = complaint(path)

    assert f"{path}:3: {told}" in message
    assert "line 1" not in message  # the decoder counts lines of its own


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt": None}, "prompt is null; a text or a list of turns is expected"),
        ({"prompt": 3}, "prompt is a number;"),
        ({"prompt": " \n"}, "prompt is empty; a text is expected"),
        ({"prompt": "a\0b"}, "prompt has a NUL at character 1;"),
        ({"prompt": "ab\ud800"}, "prompt has half a surrogate pair at character 2;"),
        ({"prompt": []}, "prompt has no turns; at least one is expected"),
        ({"prompt": ["hello"]}, "prompt[0] is a text; an object with role and content is expected"),
        ({"prompt": [{"role": "user", "content": ""}]}, "prompt[0].content is empty"),
        ({"prompt": [{"role": "user"}]}, "prompt[0].content is null; a text is expected"),
        ({"prompt": [{"content": "a"}]}, "prompt[0].role is null; use system, user, assistant or tool"),
        ({"prompt": [{"role": "usr", "content": "a"}]}, 'prompt[0].role is "usr", did you mean user?; use'),
        ({"prompt": [{"role": [[]], "content": "a"}]}, "prompt[0].role is a list; use"),
        ({"prompt": [{"role": "user", "contents": "a", "content": "a"}]}, '"contents" is no key of prompt[0]'),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "the last turn of prompt is the assistant's; user or"),
        ({"prompt": [{"role": "system", "content": "a"}]}, "the last turn of prompt is the system's;"),
        ({"response": None}, "response is null; the reply as a text is expected, or no such key"),
        ({"response": ""}, "response is empty"),
        ({"response": "a\0"}, "response has a NUL at character 1"),
        ({"group": 3}, "group is a number; the group as a text is expected"),
        ({"language": ["de"]}, "language is a list;"),
        ({"lables": {}}, '"lables" is no key of a row, did you mean labels?; use prompt, response, labels,'),
        ({"labels": None}, "labels is null; an object with at least one of harmful, injection,"),
        ({"labels": {}}, "labels is empty;"),
        ({"labels": []}, "labels is a list;"),
        ({"labels": {"harmful": 1}}, "labels.harmful is 1; true or false is expected"),
        ({"labels": {"harmful": "true"}}, 'labels.harmful is "true"; true or false is expected'),
        ({"labels": {"harmful": None}}, "labels.harmful is null; true or false is expected"),
        ({"labels": {"harmfull": True}}, '"harmfull" is no label, did you mean harmful?; use'),
        ({"labels": {"unsafe": True}}, "labels.unsafe is about a reply, but there is no response; add it"),
    ],
)
def test_a_wrong_value_is_told_with_what_is_expected(write: Write, change: dict[str, Any], told: str) -> None:
    path = write(GOOD | change)

    assert f"{path}:1: {told}" in complaint(path)


@pytest.mark.parametrize("key", ["prompt", "labels"])
def test_prompt_and_labels_have_to_be_there(write: Write, key: str) -> None:
    path = write({k: v for k, v in GOOD.items() if k != key})

    assert f":1: no {key}; " in complaint(path)


@pytest.mark.parametrize(
    ("name", "opposite"),
    [("harmless", "harmful"), ("unharmful", "harmful"), ("safe", "unsafe"), ("truthful", "untruthful")],
)
def test_the_opposite_of_a_label_is_not_taken_for_a_slip_of_the_pen(write: Write, name: str, opposite: str) -> None:
    message = complaint(write(GOOD | {"labels": {name: True}}))

    assert f'"{name}" is no label; write "{opposite}" with the opposite value' in message
    assert "did you mean" not in message


@pytest.mark.parametrize("name", ["dishonest", "not_harmful", "non-injection"])
def test_no_label_is_suggested_for_what_may_be_its_negation(write: Write, name: str) -> None:
    message = complaint(write(GOOD | {"labels": {name: True}}))

    assert f'"{name}" is no label; use harmful, ' in message


def test_every_mistake_of_a_row_is_told_at_once(write: Write) -> None:
    message = complaint(write({"promt": "a", "labels": {"harmful": 1}, "response": 2}))

    assert all(part in message for part in ('"promt"', "no prompt", "response is a number", "labels.harmful is 1"))


def test_a_long_value_is_shortened(write: Write) -> None:
    message = complaint(write(GOOD | {"labels": {"harmful": "x" * 10_000}}))

    assert len(message) < 500


# --- long lines and big files ---


def row_of(size: int) -> bytes:
    """A sound row of exactly ``size`` bytes."""
    empty = json.dumps(labelled("", honest=True)).encode()
    row = json.dumps(labelled("a" * (size - len(empty)), honest=True)).encode()
    assert len(row) == size
    return row


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("extra", [-1, 0, 1, 2, 3, 4, 5, 6, 100_000])
def test_the_longest_line_is_the_same_with_any_line_end_or_mark(
    write: Write, monkeypatch: pytest.MonkeyPatch, extra: int, mark: bytes, newline: bytes
) -> None:
    monkeypatch.setattr(own, "MAX_LINE_BYTES", 1000)
    path = write(mark + row_of(1000 + extra), GOOD, newline=newline)

    read = read_own(path, skip_broken=True)

    too_long = [f"{path}:1: longer than 1000 bytes; one prompt a line is expected"] if extra > 0 else []
    assert read.broken == too_long
    assert read.examples[-1].prompt == GOOD["prompt"]  # what follows is read from its own beginning
    assert len(read.examples) == 2 - len(too_long)


def test_a_line_is_not_held_in_memory_whatever_its_length() -> None:
    class Counting(io.BytesIO):
        largest = 0

        def readline(self, size: int | None = -1, /) -> bytes:
            line = super().readline(size)
            self.largest = max(self.largest, len(line))
            return line

    file = Counting(b"x" * (5 * MAX_LINE_BYTES) + b"\n{}\n")

    assert list(own._lines(file)) == [None, b"{}"]
    assert file.largest < MAX_LINE_BYTES + 10


def test_more_rows_than_allowed_stop_the_reading_broken_ones_counted(write: Write) -> None:
    path = write(GOOD, b"", b"broken", GOOD)

    assert len(read_own(path, skip_broken=True, max_rows=3).examples) == 2
    with pytest.raises(DataError, match=r"mine\.jsonl:4: more than 2 rows"):
        read_own(path, skip_broken=True, max_rows=2)


# --- broken rows ---


def test_broken_rows_stop_the_reading_ten_are_shown_and_all_are_counted(write: Write) -> None:
    path = write(GOOD, *[b"broken"] * 12)

    lines = complaint(path).splitlines()

    assert lines[0] == f"{path}: 12 rows are broken"
    assert [line.split(": ")[0].strip() for line in lines[1:11]] == [f"{path}:{n}" for n in range(2, 12)]
    assert lines[11:] == ["  … and 2 more"]


def test_one_broken_row_is_one_row(write: Write) -> None:
    assert complaint(write(b"broken")).splitlines()[0].endswith("1 row is broken")


def test_broken_rows_are_left_out_and_reported_where_that_is_asked_for(write: Write) -> None:
    path = write(b"broken", GOOD, labelled("x", harmful=0))

    read = read_own(path, skip_broken=True)

    assert [e.prompt for e in read.examples] == [GOOD["prompt"]]
    assert [entry.split(": ")[0] for entry in read.broken] == [f"{path}:1", f"{path}:3"]


def test_a_file_without_a_sound_row_says_what_is_wrong_with_them(write: Write) -> None:
    path = write(labelled("x", harmful=0), labelled("y", harmful=0))

    with pytest.raises(DataError, match="no sound row among 2") as caught:
        read_own(path, skip_broken=True)

    assert f"{path}:2: labels.harmful is 0" in caught.value.message


@pytest.mark.parametrize("lines", [(), (b"", b" ")])
def test_an_empty_file_is_an_error(write: Write, lines: tuple[bytes, ...]) -> None:
    assert "no sound row among 0" in complaint(write(*lines))


# --- contradictions ---


@pytest.mark.parametrize("skip_broken", [True, False])
def test_the_same_prompt_with_another_label_is_an_error_with_both_lines(write: Write, skip_broken: bool) -> None:
    path = write(labelled("Kill it!", harmful=True), b"", labelled(" kill  IT! ", harmful=False))

    with pytest.raises(DataError) as caught:
        read_own(path, skip_broken=skip_broken)

    assert caught.value.message.splitlines() == [
        f"{path}: 1 row is at odds with an earlier one",
        f"  {path}:3: labels.harmful is false, but true for the same in line 1",
    ]


def test_a_label_of_the_prompt_has_to_hold_beside_any_reply(write: Write) -> None:
    one, other = (labelled("x", harmful=h) | {"response": r} for h, r in ((True, "a"), (False, "b")))

    assert "labels.harmful is false, but true" in complaint(write(one, other))


def test_two_replies_to_a_prompt_may_be_judged_differently_one_reply_may_not(write: Write) -> None:
    one, other = (labelled("x", unsafe=u) | {"response": r} for u, r in ((True, "a"), (False, "b")))

    assert len(read_own(write(one, other), skip_broken=False).examples) == 2
    assert "labels.unsafe is false, but true" in complaint(write(one, other | {"response": "A "}))


def test_the_turns_before_are_part_of_what_is_asked(write: Write) -> None:
    after = [{"role": "system", "content": "This is a chemistry class."}, {"role": "user", "content": "Mix them?"}]
    path = write(labelled("Mix them?", harmful=True), {"prompt": after, "labels": {"harmful": False}})

    assert len(read_own(path, skip_broken=False).examples) == 2


def test_the_same_row_twice_and_labels_that_add_up_are_no_contradiction(write: Write) -> None:
    path = write(GOOD, GOOD, labelled(GOOD["prompt"], honest=False))  # type: ignore[arg-type]

    assert len(read_own(path, skip_broken=False).examples) == 3


def test_a_row_is_named_once_and_its_other_labels_still_count(write: Write) -> None:
    path = write(
        labelled("x", harmful=True, helpful=True),
        labelled("x", harmful=False, helpful=False, honest=True),
        labelled("x", honest=False),
    )

    lines = complaint(path).splitlines()

    assert lines[0].endswith("2 rows are at odds with an earlier one")
    assert [line.strip().removeprefix(f"{path}:") for line in lines[1:]] == [
        "2: labels.harmful is false, but true for the same in line 1",
        "3: labels.honest is false, but true for the same in line 2",
    ]


def test_a_broken_row_contradicts_nobody(write: Write) -> None:
    path = write(labelled("x", harmful=True) | {"group": 1}, labelled("x", harmful=False))

    assert len(read_own(path, skip_broken=True).examples) == 1


# --- files that cannot be read ---


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert complaint(tmp_path / "no.jsonl") == f"{tmp_path / 'no.jsonl'}: cannot be read (No such file or directory)"
    assert "cannot be read (Is a directory)" in complaint(tmp_path)


def test_a_gzip_file_that_ends_too_soon_is_no_shorter_file(write: Write) -> None:
    path = write(*[labelled(f"prompt {i}", honest=True) for i in range(100)], name="mine.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(DataError, match="cannot be read"):
        read_own(path, skip_broken=True)


def test_a_file_that_is_no_gzip_in_spite_of_its_name_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl.gz"
    path.write_text(json.dumps(GOOD))

    assert "cannot be read (Not a gzipped file" in complaint(path)


def test_gzip_content_that_was_damaged_is_told(write: Write) -> None:
    path = write(*[labelled(f"prompt {i * i}", honest=True) for i in range(300)], name="mine.jsonl.gz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)

    with pytest.raises(DataError):
        read_own(path, skip_broken=False)
