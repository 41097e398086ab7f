"""Anthropic's Python client."""

from typing import Any

import anthropic
from probe import HARMFUL, HELLO, SCRIPTED, WEATHER, feature, holds, run, same

TOOLS = [{"name": "weather", "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}]


def client(url: str) -> anthropic.Anthropic:
    # strict: the client itself refuses a body that does not fit its types
    return anthropic.Anthropic(
        base_url=url.removesuffix("/v1"), api_key="unused", max_retries=0, timeout=120, _strict_response_validation=True
    )


def asked(**more: Any) -> dict[str, Any]:
    return {"model": "hhh-auto", "max_tokens": 24, "messages": HELLO, **more}


@feature("chat")
def chat(url: str) -> None:
    reply = client(url).messages.create(**asked(system="Answer in one sentence."))
    holds("Paris" in reply.content[0].text, f"it said {reply.content[0].text!r}")


@feature("stream")
def stream(url: str) -> None:
    with client(url).messages.stream(**asked()) as events:
        text = "".join(events.text_stream)
        last = events.get_final_message()
    same(text, last.content[0].text)
    holds("Paris" in text and last.usage.output_tokens, f"it said {text!r}")


@feature("tools")
def tools(url: str) -> None:
    forced = {"type": "tool", "name": "weather"}
    reply = client(url).messages.create(**asked(tools=TOOLS, tool_choice=forced, max_tokens=100))
    [used] = [b for b in reply.content if b.type == "tool_use"]
    same((reply.stop_reason, used.name, list(used.input)), ("tool_use", "weather", ["city"]))


@feature("agent loop", by=SCRIPTED)
def loop(url: str) -> None:
    with client(url).messages.stream(**asked(tools=TOOLS, max_tokens=100)) as events:
        called = events.get_final_message()
    [used] = [b for b in called.content if b.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": used.id, "content": "12 degrees"}
    turns = [*HELLO, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
    same(client(url).messages.create(**asked(tools=TOOLS, messages=turns)).content[0].text, "It is mild.")


@feature("refusal")
def refusal(url: str) -> None:
    same(client(url).messages.create(**asked(messages=HARMFUL)).stop_reason, "refusal")


@feature("errors")
def errors(url: str) -> None:
    for wrong, kind in (
        ({"model": "nonesuch"}, anthropic.NotFoundError),
        ({"max_tokens": 0}, anthropic.BadRequestError),
    ):
        try:
            client(url).messages.create(**asked(**wrong))
        except kind as error:
            same(error.body["type"], "error")
        else:
            raise AssertionError(f"{wrong} was taken")


@feature("`hhh`")
def block(url: str) -> None:
    raw = client(url).messages.with_raw_response.create(**asked())
    same(raw.parse().model_extra["hhh"]["request_id"], raw.headers["x-hhh-request-id"])
    events = list(client(url).messages.create(**asked(), stream=True))
    ids = [events[0].message.model_extra["hhh"]["request_id"], events[-2].model_extra["hhh"]["request_id"]]
    same(ids[0], ids[1])


@feature("messages")
def messages(url: str) -> None:
    counted = client(url).messages.count_tokens(model="hhh-auto", messages=HELLO, system="Answer.").input_tokens
    same(client(url).messages.create(**asked(system="Answer.")).usage.input_tokens, counted)


run("anthropic")
