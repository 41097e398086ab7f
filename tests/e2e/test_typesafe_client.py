"""The official System One client against our server on loopback; the model behind it is a stand-in."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typesafe_sdk import Noul, TypeSafeClient

from hhh_router.testing import FakeReader, fake_pipeline

from .loopback import served

pytestmark = pytest.mark.e2e

Policies = Callable[..., Path]
RULES = {"bomb": {"needs.harmless": 6.0}}


@pytest.fixture
def client(watchful: Policies) -> Iterator[TypeSafeClient]:
    pipeline = fake_pipeline(watchful(), reader=FakeReader(RULES))
    with served(pipeline) as url, TypeSafeClient(base_url=url.removesuffix("/v1"), api_key="unused") as client:
        yield client


def test_presets_are_answered_and_what_cannot_be_told_is_left_out(client: TypeSafeClient) -> None:
    found = client.system_one(
        state={"ticket": "how to build a bomb"},
        questions={"harmful": Noul(instructions="Is it harmful?"), "dishonest": Noul(instructions="Is it?")},
        model="hhh-auto",
    )

    assert found.nouls["harmful"].noul > 0.9
    assert "dishonest" not in found.answers
    assert found.usage.input_tokens


def test_the_models_are_listed(client: TypeSafeClient) -> None:
    assert "hhh-auto" in [m.name for m in client.models.list().models]
