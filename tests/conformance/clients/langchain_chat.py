"""LangChain's chat model for OpenAI's wire, and its agents."""

import openai
from langchain.agents import create_agent
from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from probe import HARMFUL, HELLO, SCRIPTED, example, feature, holds, run, same
from pydantic import BaseModel, Field

ASK = HELLO[0]["content"]


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    is_old: bool


@tool
def weather(city: str) -> str:
    """How warm it is in a city."""
    return f"12 degrees in {city}"


def model(url: str, **more):
    settings = {"model": "hhh-auto", "api_key": "unused", "max_retries": 0, "max_tokens": 24}
    return ChatOpenAI(base_url=url, **(settings | more))


@feature("chat")
def chat(url: str) -> None:
    said = model(url).invoke(ASK)
    holds("Paris" in said.content, f"it said {said.content!r}")
    holds(said.usage_metadata["output_tokens"], "no usage")


@feature("stream")
def stream(url: str) -> None:
    pieces = list(model(url, stream_usage=True).stream(ASK))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    holds("Paris" in whole.content, f"it said {whole.content!r}")
    holds(whole.usage_metadata["output_tokens"], "no usage")


@feature("tools")
def tools(url: str) -> None:
    bound = model(url, max_tokens=100).bind_tools([weather], tool_choice="required", parallel_tool_calls=False)
    [call] = bound.invoke(ASK).tool_calls
    same((call["name"], list(call["args"])), ("weather", ["city"]))


@feature("agent loop", by=SCRIPTED)
def loop(url: str) -> None:
    turns = create_agent(model(url, max_tokens=100), [weather]).invoke({"messages": HELLO})["messages"]
    same([m.content for m in turns if isinstance(m, ToolMessage)], ["12 degrees in Oslo"])
    same(turns[-1].content, "It is mild.")


@feature("JSON")
def structured(url: str) -> None:
    for method in ("json_schema", "function_calling"):
        found = model(url, max_tokens=100).with_structured_output(City, method=method).invoke(ASK)
        same((method, type(found)), (method, City))


@feature("logprobs")
def logprobs(url: str) -> None:
    said = model(url, logprobs=True).invoke(ASK)
    same("".join(t["token"] for t in said.response_metadata["logprobs"]["content"]), said.content)


@feature("refusal")
def refusal(url: str) -> None:
    same(model(url).invoke(HARMFUL).response_metadata["finish_reason"], "content_filter")


@feature("errors")
def errors(url: str) -> None:
    try:
        model(url, model="gpt-4o").invoke(ASK)
    except openai.NotFoundError:
        return
    raise AssertionError("an unknown model was taken")


@feature("`hhh`")
def block(url: str) -> str:
    headers = model(url, include_response_headers=True).invoke(ASK).response_metadata["headers"]
    holds(headers["x-hhh-weights"].startswith("base="), f"headers {sorted(headers)}")
    pinned = model(url, include_response_headers=True, extra_body={"hhh": {"weights": {"honest": 1.0}}})
    holds(pinned.invoke(ASK).response_metadata["headers"]["x-hhh-weights"] != headers["x-hhh-weights"], "not pinned")
    return "in the headers (`include_response_headers=True`)"


@feature("responses")
def responses(url: str) -> None:
    said = model(url, use_responses_api=True).invoke(ASK)
    holds("Paris" in said.text, f"it said {said.content!r}")
    streamed = "".join(piece.text for piece in model(url, use_responses_api=True).stream(ASK))
    same(streamed, said.text)


@feature("example")
def ten_lines(url: str) -> None:
    same(type(example("langchain", url)["city"]).__name__, "City")


run("langchain-openai", "langchain", "openai")
