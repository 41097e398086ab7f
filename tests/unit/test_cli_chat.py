"""``hhh-router chat``, once and as a conversation, on a real pipeline around a fake model."""

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hhh_router import HHHRouter
from hhh_router.cli.main import app
from hhh_router.cli.render import bar, explain_lines
from hhh_router.cli.repl import Repl
from hhh_router.errors import GeneratorError
from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline

HARMFUL = {"bomb": {"needs.harmless": 6.0}}


def make_router(**options: Any) -> Callable[..., HHHRouter]:
    """What the command opens instead of the real model."""

    def make(*, bundle: str | None, policy: str | None) -> HHHRouter:
        return HHHRouter(policy=policy, pipeline=fake_pipeline(policy or "balanced", **options))

    return make


def chat(*arguments: str, stdin: str | bytes | None = None, **options: Any) -> Any:
    options.setdefault("reader", FakeReader(HARMFUL))
    return CliRunner().invoke(app, ["chat", *arguments], input=stdin, obj=make_router(**options))


def test_the_reply_goes_to_stdout_and_the_numbers_to_stderr() -> None:
    result = chat("What is the capital of France?")

    assert result.exit_code == 0
    assert result.stdout == "The capital of France is Paris.\n"
    for shown in ("balanced@", "hhh@", "base", "helpful", "harmless", "honest", "confidence", "decision (input)"):
        assert shown in result.stderr


def test_json_is_one_object_with_text_and_the_block() -> None:
    result = chat("What is the capital of France?", "--json")

    found = json.loads(result.stdout)
    assert list(found) == ["text", "hhh"]
    assert found["text"] == "The capital of France is Paris."
    assert sum(found["hhh"]["weights"].values()) == pytest.approx(1)
    assert result.stderr == ""


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_refused_prompt_exits_3_with_the_policys_message(form: list[str]) -> None:
    generator = FakeGenerator("First you", reader=FakeReader(HARMFUL))

    result = chat("How do I build a bomb?", *form, generator=generator)

    assert result.exit_code == 3
    assert "First you" not in result.output
    assert "refuse" in result.output


def test_a_prompt_can_be_piped_in() -> None:
    generator = FakeGenerator()

    result = chat(stdin="What is the capital of France?\n", generator=generator)

    assert result.exit_code == 0
    assert generator.requests[0].messages[-1].content == "What is the capital of France?\n"


@pytest.mark.parametrize("stdin", [b"\xff\xfe\x00binary", ""])
def test_piped_input_that_is_no_prompt_exits_2_without_a_traceback(stdin: str | bytes) -> None:
    result = chat(stdin=stdin)

    assert result.exit_code == 2
    assert result.stderr.startswith("hhh-router: ")
    assert "Traceback" not in result.output


def test_more_piped_input_than_a_request_may_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HHH_ROUTER_MAX_BODY_BYTES", "1024")

    result = chat(stdin="x" * 2000)

    assert result.exit_code == 2
    assert "more than 1024 bytes" in result.stderr


def test_options_reach_the_request() -> None:
    generator = FakeGenerator()

    chat("Hi", "--system", "Be brief.", "--max-tokens", "3", "--temperature", "0.5", "--seed", "7", generator=generator)

    (request,) = generator.requests
    assert [(m.role, m.content) for m in request.messages] == [("system", "Be brief."), ("user", "Hi")]
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.seed) == (3, 0.5, 7)


@pytest.mark.parametrize("weights", ["hhh@0-16-0-0", "helpful=1"])
def test_weights_can_be_pinned_in_both_spellings(weights: str) -> None:
    generator = FakeGenerator()

    result = chat("Hi", "--weights", weights, generator=generator)

    assert result.exit_code == 0
    assert generator.requests[0].weights.helpful == 1.0


@pytest.mark.parametrize("weights", ["hhh@1-2-3", "helpful=0.5", "kind=1", "helpful=lots", "="])
def test_weights_that_are_no_distribution_exit_2_before_any_model_is_opened(weights: str) -> None:
    def never(**options: object) -> None:
        raise AssertionError("opened")

    result = CliRunner().invoke(app, ["chat", "Hi", "--weights", weights], obj=never)

    assert result.exit_code == 2
    assert repr(weights) in result.stderr


def test_another_policy_is_applied_and_named() -> None:
    result = chat("Hi", "--policy", "harmless-first", "--json")

    assert json.loads(result.stdout)["hhh"]["policy"]["name"] == "harmless-first"


def test_in_shadow_mode_the_reply_comes_and_the_panel_says_that_nothing_was_enforced(
    watchful: Callable[..., Any],
) -> None:
    generator = FakeGenerator(reader=FakeReader(HARMFUL))

    result = chat("How do I build a bomb?", "--policy", str(watchful(mode="shadow")), generator=generator)

    assert result.exit_code == 0
    assert result.stdout == "The capital of France is Paris.\n"
    assert "(shadow)" in result.stderr


def test_an_unknown_policy_exits_2_and_names_it() -> None:
    result = chat("Hi", "--policy", "nope")

    assert result.exit_code == 2
    assert "nope" in result.stderr


def test_a_model_that_breaks_off_never_ends_as_an_allow() -> None:
    generator = FakeGenerator(fail_after=(2, GeneratorError("the model broke off")))

    result = chat("Hi", generator=generator)

    assert result.exit_code in (1, 3)


class Script:
    """Lines a person types; remembers the prompts."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines: Iterator[Any] = iter(lines)

    def __call__(self, prompt: str) -> str:
        line = next(self._lines, EOFError)
        if isinstance(line, str):
            return line
        raise line


def talk(*lines: str | type[BaseException], generator: FakeGenerator | None = None, **options: Any) -> str:
    """What a conversation shows beside the replies."""
    generator = generator or FakeGenerator(reader=FakeReader(HARMFUL))
    shown = io.StringIO()
    with make_router(generator=generator)(bundle=None, policy=None) as router:
        Repl(router, read=Script(*lines), console=Console(file=shown, width=100), **options).run()
    return shown.getvalue()


def test_a_conversation_remembers_its_turns_until_reset() -> None:
    generator = FakeGenerator()

    talk("one", "two", "/reset", "three", generator=generator)

    assert [[m.content for m in r.messages] for r in generator.requests] == [
        ["one"],
        ["one", "The capital of France is Paris.", "two"],
        ["three"],
    ]


def test_a_turn_that_was_stopped_is_not_remembered() -> None:
    generator = FakeGenerator(reader=FakeReader(HARMFUL))

    talk("How do I build a bomb?", "What is the capital of France?", generator=generator)

    assert [m.content for m in generator.requests[-1].messages] == ["What is the capital of France?"]


def test_why_explains_the_last_decision_step_by_step() -> None:
    shown = talk("/why", "How do I build a bomb?", "/why")

    assert "nothing was decided yet" in shown
    for part in (
        "1. measured",
        "harmless 1.00",
        "3. policy     balanced@",
        "4. applied",
        "refuse by checkpoints.input[",
    ):
        assert part in shown


def test_policy_and_weights_hold_from_there_on() -> None:
    generator = FakeGenerator()

    shown = talk(
        "/policy harmless-first", "/weights hhh@0-16-0-0", "a", "/weights auto", "b", "/policy", generator=generator
    )

    assert [r.weights and r.weights.helpful for r in generator.requests] == [1.0, None]
    assert {r.policy for r in generator.requests} == {"harmless-first"}
    assert "policy: harmless-first@1" in shown
    assert "shipped: balanced" in shown


def test_a_mistake_in_a_command_is_told_and_the_conversation_goes_on() -> None:
    generator = FakeGenerator()

    shown = talk("/policy nope", "/weights much", "/dance", "still here", generator=generator)

    assert "nope" in shown
    assert "weights 'much'" in shown
    assert "no command /dance" in shown
    assert len(generator.requests) == 1


def test_an_interrupt_at_the_prompt_does_not_leave_and_quit_does() -> None:
    generator = FakeGenerator()

    talk(KeyboardInterrupt, "one", "/help", "/quit", "never", generator=generator)

    assert len(generator.requests) == 1


def test_on_a_terminal_the_weights_come_before_the_text() -> None:
    shown = io.StringIO()
    with make_router()(bundle=None, policy=None) as router:
        Repl(router, read=Script("hi"), console=Console(file=shown, width=100, force_terminal=True)).run()

    assert shown.getvalue().index("hhh@") < shown.getvalue().index("╭")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999, 1.0])
def test_a_bar_keeps_its_width_and_shows_every_share_above_zero(share: float) -> None:
    drawn = bar(share, cells=10)

    assert len(drawn) == 10
    assert (drawn.strip() == "") == (share == 0.0)


def test_markup_in_a_reason_is_shown_and_not_obeyed() -> None:
    with make_router()(bundle=None, policy=None) as router:
        block = router.guard(prompt="hi").metadata
    decision = block.decisions[0].model_copy(update={"reason": "[bold]x[/bold]"})
    block = block.model_copy(update={"decisions": [decision]})

    assert any("[bold]x[/bold]" in line for line in explain_lines(block))
    from hhh_router.cli.render import panel

    shown = io.StringIO()
    Console(file=shown, width=200).print(panel(block))
    assert "[bold]x[/bold]" in shown.getvalue()
