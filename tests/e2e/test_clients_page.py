"""The example of docs/clients.md for OpenAI's client, on a stand-in; `make conformance` runs the others too."""

import pytest

from hhh_router.testing import FakeGenerator, fake_pipeline
from tests.conformance.clients.probe import example

from .loopback import served

pytestmark = pytest.mark.e2e


def test_two_changed_lines_are_enough(capsys: pytest.CaptureFixture[str]) -> None:
    with served(fake_pipeline(generator=FakeGenerator("Paris."))) as url:
        reply = example("openai", url)["reply"]

    assert reply.choices[0].message.content == "Paris."
    assert "'honest':" in capsys.readouterr().out
