"""instructor: replies of a given type, by JSON schema and by tools."""

import instructor
import openai
from probe import HELLO, feature, run, same
from pydantic import BaseModel, ConfigDict, Field


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")  # instructor's schemas leave room for more, which the small model fills
    name: str = Field(max_length=20)
    is_old: bool


def create(url: str, mode: instructor.Mode) -> City:
    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="unused", max_retries=0), mode=mode)
    return client.chat.completions.create(
        model="hhh-auto", response_model=City, messages=HELLO, max_retries=0, max_tokens=100
    )


@feature("tools")
def tools(url: str) -> None:
    same(type(create(url, instructor.Mode.TOOLS)).__name__, "City")


@feature("JSON")
def structured(url: str) -> str:
    same(type(create(url, instructor.Mode.JSON_SCHEMA)).__name__, "City")
    return "with `extra='forbid'`: else the schema allows more fields, and the default model writes them without an end"


run("instructor", "openai")
