"""OpenAI's Agents SDK: the loop of calls and results, over chat completions and responses."""

import asyncio
from typing import Any

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from probe import HARMFUL, HELLO, SCRIPTED, example, feature, holds, run, same
from pydantic import BaseModel, Field

set_tracing_disabled(True)  # it would send traces to OpenAI
ASK = HELLO[0]["content"]


class City(BaseModel):
    name: str = Field(max_length=20)
    is_old: bool


def agent(url: str, kind: type = OpenAIChatCompletionsModel, name: str = "hhh-auto", **more: Any) -> Agent:
    client = AsyncOpenAI(base_url=url, api_key="unused", max_retries=0)
    settings = more.pop("model_settings", ModelSettings(max_tokens=24))
    return Agent(name="guide", model=kind(model=name, openai_client=client), model_settings=settings, **more)


@feature("chat")
def chat(url: str) -> None:
    said = Runner.run_sync(agent(url, instructions="Answer in one sentence."), ASK).final_output
    holds("Paris" in said, f"it said {said!r}")


async def streamed(made: Agent) -> str:
    result = Runner.run_streamed(made, ASK)
    events = [e async for e in result.stream_events()]
    deltas = [
        e.data.delta for e in events if getattr(getattr(e, "data", None), "type", "") == "response.output_text.delta"
    ]
    same("".join(deltas), result.final_output)
    return result.final_output


@feature("stream")
def stream(url: str) -> None:
    said = asyncio.run(streamed(agent(url)))
    holds("Paris" in said, f"it said {said!r}")


def loop(url: str, kind: type) -> None:
    asked: list[str] = []

    @function_tool
    def weather(city: str) -> str:
        """How warm it is in a city."""
        asked.append(city)
        return "12 degrees"

    same((Runner.run_sync(agent(url, kind, tools=[weather]), ASK).final_output, asked), ("It is mild.", ["Oslo"]))

    async def again() -> str:
        result = Runner.run_streamed(agent(url, kind, tools=[weather]), ASK)
        async for _ in result.stream_events():
            pass
        return result.final_output

    same((asyncio.run(again()), len(asked)), ("It is mild.", 2))


@feature("agent loop", by=SCRIPTED)
def chat_loop(url: str) -> None:
    loop(url, OpenAIChatCompletionsModel)


@feature("responses", by=SCRIPTED)
def responses_loop(url: str) -> str:
    loop(url, OpenAIResponsesModel)
    return "the loop, with a tool, whole and streamed"


@feature("tools")
def tools(url: str) -> None:
    asked: list[str] = []

    @function_tool
    def weather(city: str) -> str:
        """How warm it is in a city."""
        asked.append(city)
        return "12 degrees"

    settings = ModelSettings(tool_choice="required", parallel_tool_calls=False, max_tokens=100)
    made = agent(url, tools=[weather], model_settings=settings, tool_use_behavior="stop_on_first_tool")
    same((Runner.run_sync(made, ASK).final_output, len(asked)), ("12 degrees", 1))


@feature("JSON")
def structured(url: str) -> None:
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        made = agent(url, kind, output_type=City, model_settings=ModelSettings(max_tokens=100))
        same(type(Runner.run_sync(made, ASK).final_output), City)


@feature("refusal")
def refusal(url: str) -> str:
    try:
        said = Runner.run_sync(agent(url), HARMFUL[0]["content"]).final_output
    except Exception as error:
        holds("refus" in f"{type(error).__name__} {error}".lower(), f"{type(error).__name__}: {error}")
        return f"raises {type(error).__name__}"
    holds(said, "nothing was said")
    return "the policy's words are the final output; no field tells that it is a refusal"


@feature("errors")
def errors(url: str) -> None:
    try:
        Runner.run_sync(agent(url, name="gpt-4o"), ASK)
    except openai.NotFoundError:
        return
    raise AssertionError("an unknown model was taken")


@feature("example")
def ten_lines(url: str) -> None:
    holds(example("openai-agents", url)["result"].final_output, "nothing was said")


run("openai-agents", "openai")
