"""OpenAI's Python client, versions 2 and 3."""

import json
from typing import Any

import openai
from probe import HARMFUL, HELLO, SCRIPTED, TOOLS, NotTested, example, feature, holds, run, same

MODEL = "hhh-auto"
FORCED = {"type": "function", "function": {"name": "weather"}}
CITY = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "big": {"type": "boolean"}},
    "required": ["name", "big"],
    "additionalProperties": False,
}


def client(url: str) -> openai.OpenAI:
    # strict: the client itself refuses a body that does not fit its types
    return openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=120, _strict_response_validation=True)


def ask(url: str, **more: Any) -> Any:
    return client(url).chat.completions.create(**{"model": MODEL, "messages": HELLO, "max_tokens": 24, **more})


@feature("chat")
def chat(url: str) -> None:
    reply = ask(url)
    holds("Paris" in reply.choices[0].message.content, f"it said {reply.choices[0].message.content!r}")
    same(reply.usage.total_tokens, reply.usage.prompt_tokens + reply.usage.completion_tokens)


@feature("stream")
def stream(url: str) -> None:
    with client(url).chat.completions.stream(
        model=MODEL, messages=HELLO, max_tokens=24, stream_options={"include_usage": True}
    ) as events:
        kinds = {event.type for event in events}
        last = events.get_final_completion()
    holds({"chunk", "content.delta", "content.done"} <= kinds, f"events {sorted(kinds)}")
    holds("Paris" in last.choices[0].message.content, f"it said {last.choices[0].message.content!r}")
    holds(last.usage.completion_tokens, "no usage")


@feature("tools")
def tools(url: str) -> None:
    whole = ask(url, tools=TOOLS, tool_choice=FORCED, max_tokens=100).choices[0]
    [call] = whole.message.tool_calls
    same((whole.finish_reason, call.function.name), ("tool_calls", "weather"))
    same(list(json.loads(call.function.arguments)), ["city"])
    with client(url).chat.completions.stream(
        model=MODEL, messages=HELLO, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
    ) as events:
        [streamed] = events.get_final_completion().choices[0].message.tool_calls
    same(list(json.loads(streamed.function.arguments)), ["city"])


@feature("agent loop", by=SCRIPTED)
def loop(url: str) -> None:
    clock = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
    asked = ask(url, tools=[*TOOLS, clock]).choices[0].message
    same([c.function.name for c in asked.tool_calls], ["weather", "clock"])
    results = [{"role": "tool", "tool_call_id": c.id, "content": "12"} for c in asked.tool_calls]
    turns = [*HELLO, asked.model_dump(exclude_none=True), *results]
    same(ask(url, messages=turns, tools=[*TOOLS, clock]).choices[0].message.content, "It is mild.")


@feature("JSON")
def structured(url: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    said = json.loads(ask(url, response_format=form, max_tokens=60).choices[0].message.content)
    same({k: type(v) for k, v in said.items()}, {"name": str, "big": bool})


@feature("logprobs")
def logprobs(url: str) -> None:
    choice = ask(url, logprobs=True, top_logprobs=3).choices[0]
    told = choice.logprobs.content
    same("".join(t.token for t in told), choice.message.content)
    holds(all(len(t.top_logprobs) == 3 and t.logprob <= 0 for t in told), "top_logprobs are not three of each token")


@feature("`n`")
def several(url: str) -> None:
    reply = ask(url, n=3, seed=1, temperature=1.0)
    same([c.index for c in reply.choices], [0, 1, 2])


@feature("refusal")
def refusal(url: str) -> None:
    choice = ask(url, messages=HARMFUL).choices[0]
    same(choice.finish_reason, "content_filter")
    same(choice.message.refusal, choice.message.content)


@feature("errors")
def errors(url: str) -> None:
    for wrong, kind in (({"model": "gpt-4o"}, openai.NotFoundError), ({"temperature": -1}, openai.BadRequestError)):
        try:
            ask(url, **wrong)
        except kind as error:
            holds(error.body and error.body.get("message"), f"{kind.__name__} without a message")
        else:
            raise AssertionError(f"{wrong} was taken")


@feature("`hhh`")
def block(url: str) -> None:
    raw = client(url).chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_tokens=8)
    ours = raw.parse().model_extra["hhh"]
    same(raw.headers["x-hhh-request-id"], ours["request_id"])
    pinned = ask(url, extra_body={"hhh": {"weights": {"honest": 1.0}}}).model_extra["hhh"]
    holds(pinned["weights"]["honest"] > ours["weights"]["honest"], "the weights of extra_body changed nothing")
    chunks = list(ask(url, stream=True))
    holds(chunks[0].model_extra["hhh"]["needs"] and chunks[-1].model_extra["hhh"]["outcomes"], "not in the stream")


@feature("responses")
def responses(url: str) -> None:
    made = client(url).responses
    first = made.create(model=MODEL, input="What is the capital of France?", max_output_tokens=24)
    holds("Paris" in first.output_text, f"it said {first.output_text!r}")
    made.create(model=MODEL, input="And of Italy?", previous_response_id=first.id, max_output_tokens=8)
    with made.stream(model=MODEL, input="What is the capital of France?", max_output_tokens=24) as events:
        kinds = [event.type for event in events]
        last = events.get_final_response()
    same((kinds[0], kinds[-1]), ("response.created", "response.completed"))
    same(last.output_text, first.output_text)


@feature("completions")
def completions(url: str) -> str:
    lenient = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)
    told = lenient.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=1, logprobs=2, echo=True
    )
    probs = told.choices[0].logprobs
    same("".join(probs.tokens), told.choices[0].text)
    same(probs.token_logprobs[0], None)
    return "not under strict validation: the first token of an echoed prompt has no probability, which its types forbid"


@feature("decisions")
def decisions(url: str) -> str | None:
    if not hasattr(openai.OpenAI, "decisions"):
        raise NotTested(f"openai {openai.__version__} has no decisions")
    asked = [
        {"type": "predicate", "name": "harmful", "instructions": "Is it harmful?"},
        {"type": "choice", "name": "topic", "instructions": "What is it about?", "choices": [
            {"value": "banks"}, {"value": "bread"}]},
    ]  # fmt: skip
    found = client(url).decisions.create(model=MODEL, input=HARMFUL[0]["content"], questions=asked)
    holds(found.answers[0].probability > 0.5, f"harmful: {found.answers[0].probability}")


@feature("moderations")
def moderations(url: str) -> str:
    lenient = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)
    found = lenient.moderations.create(model=MODEL, input=[HELLO[0]["content"], HARMFUL[0]["content"]])
    same([r.flagged for r in found.results], [False, True])
    return "not under strict validation: its types want OpenAI's thirteen categories, the heads tell two"


@feature("models")
def models(url: str) -> None:
    holds("hhh-auto" in [m.id for m in client(url).models.list()], "hhh-auto is not listed")


@feature("example")
def two_lines(url: str) -> None:
    holds(example("openai", url)["reply"].choices[0].message.content, "nothing was said")


run("openai")
