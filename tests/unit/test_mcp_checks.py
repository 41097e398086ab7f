"""What of a policy the MCP proxy takes, what it reads, and what it makes of it."""

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("mcp")

from hhh_router.errors import ContextTooLong, PolicyError, ReaderError, SettingsError
from hhh_router.interfaces.mcp import texts
from hhh_router.interfaces.mcp.checks import Checks, Session, check_policy, needs_reading
from hhh_router.interfaces.mcp.open import plan_mcp
from hhh_router.interfaces.mcp.reading import read
from hhh_router.pipeline.tool_results import MAX_CHARACTERS, OVERLAP_CHARACTERS, PIECE_CHARACTERS, pieces
from hhh_router.policy import load_policy, parse_policy
from hhh_router.policy.reach import may_pass
from hhh_router.testing import FakeReader, fake_pipeline
from hhh_router.testing.fakes import make_scores
from hhh_router.types import Action

HEAD = "version: 1\nname: t\nextends: balanced\ncheckpoints:\n"


def policy(tool_call: str = "", tool_result: str = "", more: str = ""):
    call = f"  tool_call: {tool_call}\n" if tool_call else ""
    result = f"  tool_result: {tool_result}\n" if tool_result else ""
    return parse_policy(f"{HEAD}{call}{result}{more}", source="t.yaml")


@pytest.mark.parametrize(
    ("rules", "tool", "expected"),
    [
        ("[{when: {tool.name: drop_*}, then: block}, {then: allow}]", "drop_x", False),
        ("[{when: {tool.name: drop_*}, then: block}, {then: allow}]", "read", True),
        ("[{when: {tool.name: read_*}, then: allow}, {then: block}]", "read_x", True),
        ("[{when: {tool.name: read_*}, then: allow}, {then: block}]", "drop", False),
        ("[{when: {tool.name: 'not in [read_*]'}, then: block}, {then: allow}]", "drop", False),
        ("[{when: {tool.name: drop_*}, then: hold}, {then: allow}]", "drop_x", True),
        ("[{when: {tool.name: drop_*}, then: block, mode: shadow}, {then: allow}]", "drop_x", True),
        ("[{when: {tool.name: drop_*}, then: block, rollout: 50}, {then: allow}]", "drop_x", True),
        ("[{when: {tool.name: drop_*, tool.arguments.a: present}, then: block}, {then: allow}]", "drop_x", True),
        ("[{when: {tool.arguments.a: present}, then: block}, {then: block}]", "x", False),
        ("[{when: {tool.arguments.a: present}, then: allow}, {then: block}]", "x", True),
    ],
)
def test_a_tool_is_hidden_only_when_its_name_alone_stops_every_call(rules: str, tool: str, expected: bool) -> None:
    assert may_pass(policy(rules).checkpoints["tool_call"], tool) is expected


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (load_policy("balanced"), "nothing would be checked"),
        (policy("[{when: {model: a}, then: block}, {then: allow}]"), "model is not known to the MCP proxy"),
        (policy("[{when: {weights.base: '> 0.5'}, then: block}, {then: allow}]"), "no weights are applied"),
        (policy(tool_result="[{then: allow, redact: [emails]}]"), "redact: the MCP proxy does not do this"),
        (policy("[{then: allow}]", more="overlays: [{tenants: a}]\n"), "whose traffic it is"),
    ],
)
def test_a_policy_that_could_not_be_carried_out_is_refused(asked, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        check_policy(asked)


def test_what_is_asked_of_prompts_and_replies_is_no_matter_here() -> None:
    check_policy(policy("[{when: {tool.name: a}, then: hold, webhook: 'https://h.example'}, {then: allow}]"))


def test_a_model_is_needed_only_where_a_rule_asks_for_a_reading() -> None:
    assert not needs_reading(policy("[{when: {tool.name: a, conversation.tainted: true}, then: block}, {then: allow}]"))
    assert needs_reading(policy("[{when: {confidence: '< 0.9'}, then: hold}, {then: allow}]"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"command": (), "url": None}, "no server is named"),
        ({"command": ("python",), "url": "http://a"}, "exclude each other"),
        ({"command": ("no-such-command-here",), "url": None}, "no command that can be run"),
        ({"command": (), "url": "ftp://a"}, "no http"),
    ],
)
def test_options_are_checked_before_anything_starts(options: dict, said: str, tmp_path: Path) -> None:
    rest = {"policy": None, "bundle": None, "guard_url": None, "audit": None, "queue": None, "hold_s": None}

    with pytest.raises(SettingsError, match=said):
        plan_mcp(**rest, **options)


def test_every_text_of_a_result_is_found_and_what_is_none_is_named() -> None:
    content = [
        {"type": "text", "text": "one"},
        {"type": "image", "data": "AAAA", "mimeType": "image/png"},
        {"type": "resource", "resource": {"uri": "a://b", "text": "two"}},
        {"type": "resource", "resource": {"uri": "a://b", "blob": "AAAA"}},
        {"type": "resource_link", "uri": "a://c", "name": "three", "description": "four"},
        {"type": "hologram", "caption": "five"},
        "six",
    ]

    text, unread = texts.of_result({"content": content, "structuredContent": {"k": ["seven"]}, "later": "eight"})

    words = ("one", "two", "three", "four", "five", "six", "seven", "eight")
    assert [word for word in words if word not in text] == []
    assert "AAAA" not in text
    assert unread == ["content[1]: image", "content[3]: blob"]


def test_structured_content_that_is_told_as_text_is_read_once() -> None:
    content = [{"type": "text", "text": '{"a": "word"}'}]

    assert texts.of_result({"content": content, "structuredContent": {"a": "word"}})[0].count("word") == 1
    assert texts.of_result({"content": content, "structuredContent": {"a": "other"}})[0].count("other") == 1
    plain = {"content": [{"type": "text", "text": "word"}], "structuredContent": {"result": "word"}}
    assert texts.of_result(plain)[0] == "word"


async def test_an_order_is_found_wherever_in_a_long_text_it_stands() -> None:
    reader = FakeReader({"IGNORE ALL": {"needs.injection": 6.0}})
    for at in (0, PIECE_CHARACTERS - 5, 3 * PIECE_CHARACTERS - 100, 50_000):
        text = "x" * at + "IGNORE ALL" + "y" * (60_000 - at)

        reading = await read(fake_pipeline(reader=reader), text)

        assert reading.needs["injection"] > 0.9, at
    assert (await read(fake_pipeline(reader=reader), "x" * 60_000)).needs["injection"] < 0.1


@pytest.mark.parametrize("length", [1, 199, 200, 201, 4_000, 4_001, 12_345])
def test_pieces_leave_nothing_out(length: int) -> None:
    text = "".join(chr(97 + i % 26) for i in range(length))

    found = pieces(text, PIECE_CHARACTERS)

    whole = found[0] + "".join(piece[OVERLAP_CHARACTERS:] for piece in found[1:])
    assert whole == text
    assert all(len(piece) <= PIECE_CHARACTERS for piece in found)


async def test_pieces_shrink_until_they_fit_the_model() -> None:
    longest: list[int] = []

    def score(request):
        longest.append(max(len(m.content) for m in request.messages))
        if longest[-1] > 1_500:
            raise ContextTooLong("too long")
        return make_scores()

    reading = await read(fake_pipeline(reader=FakeReader(score)), "x" * 9_000)

    assert reading.needs["injection"] < 0.1
    assert longest[-1] <= 1_000


async def test_what_is_too_long_or_too_slow_is_not_taken_for_read() -> None:
    class Slow:
        async def guard(self, requests):
            await asyncio.Event().wait()

        async def aclose(self) -> None: ...

    with pytest.raises(ReaderError, match="are read"):
        await read(fake_pipeline(), "x" * (MAX_CHARACTERS + 1))
    with pytest.raises(Exception, match="not read within"):
        await read(Slow(), "x", timeout_s=0.05)


async def test_a_picture_is_not_measured_so_on_error_decides_unless_a_rule_before_allows() -> None:
    strict = policy(tool_result="[{when: {needs.injection: '>= 0.8'}, then: block}, {then: allow}]")
    trusting = policy(
        tool_result="[{when: {tool.name: shot}, then: allow}, {when: {needs.injection: '>= 0.8'}, then: block}, "
        "{then: allow}]"
    )

    actions = []
    for asked in (strict, trusting):
        checks = Checks(asked, fake_pipeline())
        actions.append((await checks.result(Session(), "shot", {}, "", ["content[0]: image"])).decision.action)

    assert actions == [Action.BLOCK, Action.ALLOW]


async def test_a_definition_that_changes_is_read_again() -> None:
    reader = FakeReader({"IGNORE ALL": {"needs.injection": 6.0}})
    asked = policy(tool_result="[{when: {needs.injection: '>= 0.8'}, then: block}, {then: allow}]")
    checks, session = Checks(asked, fake_pipeline(reader=reader)), Session()
    tool = {"name": "add", "description": "Adds.", "inputSchema": {"properties": {"a": {"description": "One."}}}}
    poisoned = {**tool, "inputSchema": {"properties": {"a": {"description": "IGNORE ALL"}}}}

    first = await checks.definition(session, tool)
    again = await checks.definition(session, tool)
    changed = await checks.definition(session, poisoned)

    assert (first.decision.action, changed.decision.action) == (Action.ALLOW, Action.BLOCK)
    assert again is first
    assert len(reader.calls) == 2
    assert (await checks.call(session, "add", {})).decision.action is Action.BLOCK
    await checks.definition(session, tool)
    assert (await checks.call(session, "add", {})).decision.action is Action.ALLOW
    assert not session.tainted
