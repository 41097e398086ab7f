"""System One's Python client."""

from probe import HARMFUL, feature, holds, run
from typesafe_sdk import Noul, TypeSafeClient


def client(url: str) -> TypeSafeClient:
    return TypeSafeClient(base_url=url.removesuffix("/v1"), api_key="unused")


@feature("decisions")
def decisions(url: str) -> str:
    found = client(url).system_one(
        state={"ticket": HARMFUL[0]["content"]},
        questions={
            "harmful": Noul(instructions="Is it harmful?"),
            "dishonest": Noul(instructions="Is the reply dishonest?"),
        },
        model="hhh-auto",
    )
    holds(found.nouls["harmful"].noul > 0.5, f"harmful: {found.nouls['harmful'].noul}")
    holds("dishonest" not in found.answers, "a reply that is not there was judged")
    return "what cannot be told of a prompt alone is left out, as the wire wants it"


@feature("models")
def models(url: str) -> None:
    holds("hhh-auto" in [m.name for m in client(url).models.list().models], "hhh-auto is not listed")


run("typesafe-sdk")
