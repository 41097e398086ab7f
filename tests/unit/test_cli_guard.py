"""``hhh-router guard``, for one text and for files, on a real pipeline around a fake reader."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hhh_router import HHHRouter
from hhh_router.cli import guard as command
from hhh_router.cli.main import app
from hhh_router.errors import ContextTooLong
from hhh_router.testing import FakeReader, fake_pipeline
from hhh_router.types import ReadRequest, Scores

RULES = {"bomb": {"needs.harmless": 6.0}, "First you": {"outcomes.unsafe": 6.0}}


def make_router(reader: FakeReader) -> Callable[..., HHHRouter]:
    def make(*, bundle: str | None, policy: str | None) -> HHHRouter:
        return HHHRouter(policy=policy, pipeline=fake_pipeline(policy or "balanced", reader=reader))

    return make


def guard(*arguments: str | Path, reader: FakeReader | None = None) -> Any:
    return CliRunner().invoke(app, ["guard", *map(str, arguments)], obj=make_router(reader or FakeReader(RULES)))


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(
        tmp_path / "in.jsonl",
        {"id": 1, "prompt": "How do I bake bread?"},
        {"id": 2, "prompt": "How do I build a bomb?"},
        {"id": 3, "response": "Gladly."},
        {"id": 4, "prompt": "How do I bake bread?", "response": "With flour.", "nested": {"kept": [1, None, "é"]}},
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.mark.parametrize(
    ("arguments", "mode", "code"),
    [
        (["--prompt", "How do I bake bread?"], "prompt", 0),
        (["--prompt", "How do I build a bomb?"], "prompt", 3),
        (["--response", "Gladly."], "response", 0),
        (["--prompt", "How?", "--response", "First you"], "both", 3),
    ],
)
def test_one_text_is_judged_and_the_exit_code_says_so(arguments: list[str], mode: str, code: int) -> None:
    result = guard(*arguments, "--json")

    found = json.loads(result.stdout)
    assert result.exit_code == code
    assert found["hhh"]["mode"] == mode
    assert (found["action"] in ("refuse", "regenerate")) == (code == 3)


def test_a_flagged_prompt_does_not_hide_a_reply_that_should_be_made_anew() -> None:
    reader = FakeReader({"knives": {"needs.harmless": 0.2}, "First you": {"outcomes.unsafe": 6.0}})

    result = guard("--prompt", "About knives", "--response", "First you", "--json", reader=reader)

    actions = [decision["action"] for decision in json.loads(result.stdout)["hhh"]["decisions"]]
    assert actions == ["flag", "regenerate"]
    assert result.exit_code == 3


def test_in_shadow_mode_nothing_stops(watchful: Callable[..., Path]) -> None:
    result = guard("--prompt", "How do I build a bomb?", "--policy", watchful(mode="shadow"), "--json")

    assert json.loads(result.stdout)["hhh"]["decisions"][0]["action"] == "refuse"
    assert result.exit_code == 0


def test_without_json_the_numbers_are_shown_for_people() -> None:
    result = guard("--prompt", "How do I build a bomb?")

    assert "refuse" in result.stdout
    assert "confidence" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [[], ["--in", "a.jsonl"], ["--out", "b.jsonl"], ["--prompt", "x", "--in", "a.jsonl", "--out", "b.jsonl"]],
)
def test_texts_and_files_exclude_each_other(arguments: list[str]) -> None:
    result = guard(*arguments)

    assert result.exit_code == 2
    assert "--in" in result.stderr


def test_each_output_row_is_the_input_row_plus_its_block(source: Path, out: Path) -> None:
    result = guard("--in", source, "--out", out)

    rows = read_rows(out)
    assert result.exit_code == 0
    assert [{k: v for k, v in row.items() if k != "hhh"} for row in rows] == read_rows(source)
    assert [row["hhh"]["mode"] for row in rows] == ["prompt", "prompt", "response", "both"]
    assert rows[1]["hhh"]["decisions"][0]["action"] == "refuse"
    assert "4 rows" in result.stderr
    assert "1 refuse" in result.stderr


def test_many_rows_are_read_in_batches(tmp_path: Path, out: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", *({"prompt": f"question {n}"} for n in range(600)))
    reader = FakeReader()

    guard("--in", source, "--out", out, reader=reader)

    assert len(read_rows(out)) == 600
    assert sum(map(len, reader.calls)) == 600
    assert len(reader.calls) <= 600 / command.BATCH_ROWS + 1


def test_a_second_run_judges_only_what_is_missing(source: Path, out: Path) -> None:
    guard("--in", source, "--out", out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][:40])  # killed in the middle of a line
    reader = FakeReader(RULES)

    result = guard("--in", source, "--out", out, "--json", reader=reader)

    read = {message.content for call in reader.calls for request in call for message in request.messages}
    assert read == {"How do I bake bread?"}
    assert [row["id"] for row in read_rows(out)] == [1, 2, 3, 4]
    assert json.loads(result.stdout) == {"rows": 4, "resumed": 3, "bad": 0, "actions": {"allow": 1}}


def test_a_finished_file_is_left_alone(source: Path, out: Path) -> None:
    guard("--in", source, "--out", out)
    before = out.read_bytes()
    reader = FakeReader(RULES)

    result = guard("--in", source, "--out", out, reader=reader)

    assert result.exit_code == 0
    assert out.read_bytes() == before
    assert reader.calls == []


def test_rows_added_to_the_input_are_judged_and_appended(source: Path, out: Path) -> None:
    guard("--in", source, "--out", out)
    with source.open("a") as file:
        file.write(json.dumps({"id": 5, "prompt": "One more"}) + "\n")

    guard("--in", source, "--out", out)

    assert [row["id"] for row in read_rows(out)] == [1, 2, 3, 4, 5]


def test_an_input_that_changed_is_refused_and_nothing_is_written(source: Path, out: Path) -> None:
    guard("--in", source, "--out", out)
    before = out.read_bytes()
    write_rows(source, {"id": 1, "prompt": "How do I bake bread?"}, {"id": 2, "prompt": "Another question"})

    result = guard("--in", source, "--out", out)

    assert result.exit_code == 2
    assert "another input" in result.stderr
    assert "line 2" in result.stderr
    assert f"{out}:2" in result.stderr
    assert out.read_bytes() == before


def test_an_input_shorter_than_the_output_is_refused(source: Path, out: Path) -> None:
    guard("--in", source, "--out", out)
    write_rows(source, {"id": 1, "prompt": "How do I bake bread?"})

    result = guard("--in", source, "--out", out)

    assert result.exit_code == 2
    assert "differs at its end" in result.stderr


def test_resuming_under_another_policy_is_refused(source: Path, out: Path) -> None:
    guard("--in", source, "--out", out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:2]))

    result = guard("--in", source, "--out", out, "--policy", "harmless-first")

    assert result.exit_code == 2
    assert "judged with policy balanced" in result.stderr
    assert out.read_bytes() == b"".join(lines[:2])


BAD = {
    "not json": "not JSON",
    '["a list"]': "not a JSON object",
    '{"id": 1}': "neither prompt nor response",
    '{"prompt": null, "response": null}': "neither prompt nor response",
    '{"prompt": 3}': "prompt is int, not text",
    '{"response": ["x"]}': "response is list, not text",
    '{"prompt": "x", "hhh": {}}': "already has an 'hhh' block",
    '{"prompt": ""}': "",  # refused by the pipeline, in its own words
    '{"prompt": "\\ud800"}': "",
    "[" * 100_000: "not JSON",
}


@pytest.mark.parametrize(("line", "problem"), BAD.items(), ids=range(len(BAD)))
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, out: Path, line: str, problem: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(f'{{"prompt": "fine"}}\n\n{line}\n')

    result = guard("--in", source, "--out", out)

    assert result.exit_code == 2
    assert f"{source}:3: {problem}" in result.stderr
    assert "--skip-bad" in result.stderr
    assert "Traceback" not in result.output


def test_bad_rows_can_be_skipped_and_are_written_with_their_error(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join([*(line.encode() for line in BAD), b"\xff\xfe", b'{"prompt": "fine"}']))

    result = guard("--in", source, "--out", out, "--skip-bad")
    again = guard("--in", source, "--out", out, "--skip-bad", "--json")

    rows = read_rows(out)
    assert result.exit_code == 0
    assert f"{len(BAD) + 1} bad" in result.stderr
    assert [("hhh" in row and "error" not in row) for row in rows] == [False] * (len(BAD) + 1) + [True]
    assert rows[0] == {"raw": "not json", "error": rows[0]["error"]}
    assert json.loads(again.stdout) == {
        "rows": len(BAD) + 2,
        "resumed": len(BAD) + 2,
        "bad": len(BAD) + 1,
        "actions": {},
    }


def test_one_row_too_long_for_the_model_does_not_cost_the_others_their_batch(tmp_path: Path, out: Path) -> None:
    def read(request: ReadRequest) -> Scores:
        if "enormous" in request.messages[0].content:
            raise ContextTooLong("9000 tokens, the window holds 2048")
        return FakeReader().score(request)

    rows = [{"prompt": "enormous" if n == 77 else f"question {n}"} for n in range(200)]
    reader = FakeReader(read)

    result = guard("--in", write_rows(tmp_path / "in.jsonl", *rows), "--out", out, "--skip-bad", reader=reader)

    errors = [n for n, row in enumerate(read_rows(out)) if "error" in row]
    assert result.exit_code == 0
    assert errors == [77]
    assert "9000 tokens" in read_rows(out)[77]["error"]
    assert len(reader.calls) < 30  # halving, not one by one


def test_a_missing_input_and_an_unwritable_output_are_named(tmp_path: Path, source: Path, out: Path) -> None:
    missing = guard("--in", tmp_path / "nope.jsonl", "--out", out)
    unwritable = guard("--in", source, "--out", tmp_path / "no folder" / "out.jsonl")
    same = guard("--in", source, "--out", source)

    assert [missing.exit_code, unwritable.exit_code, same.exit_code] == [2, 2, 2]
    assert "nope.jsonl: cannot be read" in missing.stderr
    assert "cannot be written" in unwritable.stderr
    assert "same file" in same.stderr
    assert not out.exists()


def test_an_output_that_is_something_else_is_not_touched(source: Path, out: Path) -> None:
    out.write_text("notes\nof mine\n")

    result = guard("--in", source, "--out", out)

    assert result.exit_code == 2
    assert f"{out}:1: not a JSON object" in result.stderr
    assert out.read_text() == "notes\nof mine\n"
