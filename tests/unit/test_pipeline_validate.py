import math

import pytest

from hhh_router.errors import InvalidRequest
from hhh_router.pipeline.validate import check_chat, check_guard, check_messages
from hhh_router.types import ChatRequest, GuardRequest, Message, ReadRequest, Sampling


def turns(*pairs: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role=role, content=content) for role, content in pairs)


def nested(levels: int) -> str:
    """A schema of so many objects in one another."""
    return '{"a":' * (levels - 1) + "{}" + "}" * (levels - 1)


def test_a_long_conversation_with_tools_is_accepted() -> None:
    messages = turns(
        ("system", "Be kind"),
        ("user", "Weather?"),
        ("assistant", "Let me look"),
        ("tool", "12 degrees"),
        ("tool", "wind"),
        ("assistant", "Cool"),
        ("user", "Thanks"),
        ("user", "And tomorrow?"),
    )

    assert check_messages(messages, max_bytes=1000) == sum(len(m.content) for m in messages)


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ((), "no messages"),
        (turns(("user", "")), r"messages\[0\]\.content: empty"),
        (turns(("user", " \n\t")), r"messages\[0\]\.content: empty"),
        (turns(("user", "a\x00b")), r"messages\[0\]\.content: NUL character at position 1"),
        (turns(("user", "ab\ud800")), r"messages\[0\]\.content: lone surrogate at position 2"),
        (turns(("narrator", "hi")), r"messages\[0\]\.role: found 'narrator'"),
        (turns(("user", "hi"), ("system", "x")), r"messages\[1\]\.role: system after user"),
        (turns(("assistant", "hi"), ("user", "x")), r"messages\[0\]\.role: assistant as the first message"),
        (
            turns(("user", "a"), ("assistant", "b"), ("assistant", "c"), ("user", "d")),
            r"messages\[2\]\.role: assistant",
        ),
        (turns(("user", "a"), ("tool", "b")), r"messages\[1\]\.role: tool after user"),
        (turns(("user", "a"), ("assistant", "b")), r"the last message is from assistant"),
        (turns(("system", "a")), r"the last message is from system"),
    ],
)
def test_a_conversation_no_model_can_answer_is_named(messages: tuple[Message, ...], found: str) -> None:
    with pytest.raises(InvalidRequest, match=found) as raised:
        check_messages(messages, max_bytes=1000)

    assert raised.value.hint


def test_the_byte_limit_counts_all_turns_together_and_bytes_not_characters() -> None:
    messages = turns(("user", "ä" * 4), ("assistant", "ok"), ("user", "ab"))

    assert check_messages(messages, max_bytes=12) == 12
    with pytest.raises(InvalidRequest, match=r"messages\[2\]\.content: 2 bytes of text, 1 are left"):
        check_messages(messages, max_bytes=11)


def test_behind_a_proxy_any_order_and_empty_turns_pass_but_binary_text_does_not() -> None:
    odd = turns(("assistant", ""), ("system", "x"), ("critic", "y"))

    check_messages(odd, max_bytes=10, any_order=True)
    with pytest.raises(InvalidRequest, match="NUL"):
        check_messages(turns(("user", "\x00")), max_bytes=10, any_order=True)


@pytest.mark.parametrize(
    ("sampling", "found"),
    [
        (Sampling(max_tokens=0), "max_tokens: found 0"),
        (Sampling(max_tokens=True), "max_tokens: found True"),
        (Sampling(max_tokens="9"), "max_tokens: found '9'"),  # type: ignore[arg-type]
        (Sampling(temperature=math.nan), "temperature: found nan"),
        (Sampling(temperature=math.inf), "temperature: found inf"),
        (Sampling(temperature=-0.1), "temperature: found -0.1"),
        (Sampling(temperature=2.1), "temperature: found 2.1"),
        (Sampling(top_p=0.0), "top_p: found 0.0"),
        (Sampling(top_p=1.5), "top_p: found 1.5"),
        (Sampling(seed=2**70), "seed: found"),
        (Sampling(seed=1.5), "seed: found 1.5"),  # type: ignore[arg-type]
        (Sampling(stop=("",)), "stop: found"),
        (Sampling(stop=("a",) * 17), "stop: found 17 strings"),
        (Sampling(top_k=-1), "top_k: found -1"),
        (Sampling(top_k=True), "top_k: found True"),
        (Sampling(top_k=1.0), "top_k: found 1.0"),  # type: ignore[arg-type]
        (Sampling(top_logprobs=21), "top_logprobs: found 21"),
        (Sampling(top_logprobs=-1), "top_logprobs: found -1"),
        (Sampling(top_logprobs="3"), "top_logprobs: found '3'"),  # type: ignore[arg-type]
        (Sampling(logit_bias=dict.fromkeys(range(301), 1.0)), "logit_bias: found 301 entries"),
        (Sampling(logit_bias={-1: 1.0}), "logit_bias: found token -1"),
        (Sampling(logit_bias={"5": 1.0}), "logit_bias: found token '5'"),  # type: ignore[dict-item]
        (Sampling(logit_bias={5: 100.5}), r"logit_bias\[5\]: found 100.5"),
        (Sampling(logit_bias={5: math.nan}), r"logit_bias\[5\]: found nan"),
        (Sampling(logit_bias={5: True}), r"logit_bias\[5\]: found True"),
        (Sampling(json_schema={"type": "object"}), "response_format: the schema is dict"),  # type: ignore[arg-type]
        (Sampling(json_schema="{"), "response_format: the schema is no JSON: Expecting property name"),
        (Sampling(json_schema="[]"), "response_format: the schema is no object"),
        (Sampling(json_schema="{" + " " * 65_535 + "}"), "response_format: a schema of 65,537 characters"),
        (Sampling(json_schema=nested(65)), "nested more than 64 levels deep"),
        (Sampling(json_schema=nested(9_000)), "nested (more than 64 levels|too)"),
    ],
)
def test_sampling_out_of_range_is_named(sampling: Sampling, found: str) -> None:
    with pytest.raises(InvalidRequest, match=found):
        check_chat(ChatRequest(messages=turns(("user", "hi")), sampling=sampling), max_bytes=100)


def test_sampling_within_its_ranges_is_accepted() -> None:
    for sampling in (
        Sampling(top_k=1, top_logprobs=0, logit_bias={0: -100, 7: 100.0}),
        Sampling(top_logprobs=20, logit_bias=dict.fromkeys(range(300), 0.5), json_schema=nested(64)),
        Sampling(json_schema="{" + " " * 65_534 + "}"),
    ):
        check_chat(ChatRequest(messages=turns(("user", "hi")), sampling=sampling), max_bytes=100)


def test_a_guard_request_needs_a_prompt_or_a_response() -> None:
    with pytest.raises(InvalidRequest, match=r"items\[3\]\.neither prompt nor response"):
        check_guard(GuardRequest(read=ReadRequest()), max_bytes=10, where="items[3].")
    with pytest.raises(InvalidRequest, match="response: empty"):
        check_guard(GuardRequest(read=ReadRequest(response="")), max_bytes=10)
    with pytest.raises(InvalidRequest, match="response: 4 bytes of text, 2 are left"):
        check_guard(GuardRequest(read=ReadRequest(messages=turns(("user", "12345678")), response="1234")), max_bytes=10)
