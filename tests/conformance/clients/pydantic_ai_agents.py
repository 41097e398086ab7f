"""Pydantic AI's agents, over chat completions and responses."""

import asyncio

from openai import AsyncOpenAI
from probe import HARMFUL, HELLO, SCRIPTED, example, feature, holds, run, same
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

ASK = HELLO[0]["content"]


class City(BaseModel):
    name: str = Field(max_length=20)
    is_old: bool


def model(url: str, kind: type = OpenAIChatModel, name: str = "hhh-auto"):
    return kind(name, provider=OpenAIProvider(openai_client=AsyncOpenAI(base_url=url, api_key="unused", max_retries=0)))


@feature("chat")
def chat(url: str) -> None:
    said = Agent(model(url), model_settings={"max_tokens": 24}).run_sync(ASK)
    holds("Paris" in said.output, f"it said {said.output!r}")
    holds(said.usage.output_tokens, "no usage")


@feature("stream")
def stream(url: str) -> None:
    async def streamed() -> str:
        async with Agent(model(url), model_settings={"max_tokens": 24}).run_stream(ASK) as result:
            return "".join([piece async for piece in result.stream_text(delta=True)])

    said = asyncio.run(streamed())
    holds("Paris" in said, f"it said {said!r}")


def loop(url: str, kind: type) -> None:
    asked: list[str] = []
    agent = Agent(model(url, kind))

    @agent.tool_plain
    def weather(city: str) -> str:
        """How warm it is in a city."""
        asked.append(city)
        return "12 degrees"

    same((agent.run_sync(ASK).output, asked), ("It is mild.", ["Oslo"]))


@feature("agent loop", by=SCRIPTED)
def chat_loop(url: str) -> None:
    loop(url, OpenAIChatModel)


@feature("responses", by=SCRIPTED)
def responses_loop(url: str) -> str:
    loop(url, OpenAIResponsesModel)
    return "the loop, with a tool"


@feature("tools")
def tools(url: str) -> str:
    found = Agent(model(url), output_type=City, model_settings={"max_tokens": 100}).run_sync(ASK)
    same(type(found.output), City)
    return "a reply of a given type, by a tool that must be called"


@feature("JSON")
def native(url: str) -> None:
    found = Agent(model(url), output_type=NativeOutput(City), model_settings={"max_tokens": 100}).run_sync(ASK)
    same(type(found.output), City)


@feature("refusal")
def refusal(url: str) -> str:
    try:
        said = Agent(model(url)).run_sync(HARMFUL[0]["content"])
    except Exception as error:  # its own class for it has changed between versions: what it is, is told
        holds("content" in f"{type(error).__name__} {error}".lower(), f"{type(error).__name__}: {error}")
        return f"raises {type(error).__name__}"
    same(said.response.finish_reason, "content_filter")
    return "the policy's words as output, `finish_reason` is `content_filter`"


@feature("errors")
def errors(url: str) -> None:
    try:
        Agent(model(url, name="gpt-4o")).run_sync(ASK)
    except ModelHTTPError as error:
        same(error.status_code, 404)
    else:
        raise AssertionError("an unknown model was taken")


@feature("example")
def ten_lines(url: str) -> None:
    same(type(example("pydantic-ai", url)["result"].output).__name__, "City")


run("pydantic-ai-slim", "openai")
