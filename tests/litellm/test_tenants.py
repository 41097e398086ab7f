"""Overlays by team, through LiteLLM's real proxy: whose traffic it is comes from LiteLLM's own keys."""

import re
from collections.abc import Iterator

import httpx
import pytest

pytest.importorskip("litellm", reason="LiteLLM has an environment of its own: make test-litellm")

from .conftest import Policies, Setting, ask, started

pytestmark = [pytest.mark.e2e, pytest.mark.litellm]

SCHOOLS = """
overlays:
  - tenants: [school-*]
    checkpoints:
      input:
        - {when: {text: ['answer key']}, then: refuse, message: "Please ask your teacher."}
      output:
        - {when: {text: ['nothing else']}, then: block, message: "Not for pupils."}
"""
TEAMS = """\
from litellm.proxy._types import UserAPIKeyAuth


async def who(request, api_key: str) -> UserAPIKeyAuth:
    if not api_key.startswith("sk-of-"):
        raise ValueError("no such key")
    team = api_key.removeprefix("sk-of-")
    return UserAPIKeyAuth(api_key=api_key, team_id=f"id-of-{team}", team_alias=team, user_id="somebody")
"""
WIRES = ("chat/completions", "messages", "responses")
streams = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@pytest.fixture(scope="module")
def teams(watchful: Policies, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """The shipped configuration, with keys of two teams and a guardrail that goes by them."""
    folder = tmp_path_factory.mktemp("teams")
    (folder / "teams.py").write_text(TEAMS)
    general = {"custom_auth": "teams.who"}
    with started(watchful, folder, overlay=SCHOOLS, general=general, guardrail_tenant="team_alias") as made:
        yield made


def words(reply: httpx.Response) -> str:
    """The text of a reply on any wire, streamed or not, its pieces put together."""
    return "".join(re.findall(r'"(?:text|content|delta)": ?"((?:[^"\\]|\\.)*)"', reply.text))


def by(setting: Setting, team: str, wire: str, text: str, *, stream: bool) -> httpx.Response:
    return ask(f"{setting.url}/v1", wire, "other", text, stream=stream, key=f"sk-of-{team}")


@pytest.mark.parametrize("wire", WIRES)
@streams
def test_an_overlay_stops_the_prompts_of_its_team_alone(teams: Setting, wire: str, stream: bool) -> None:
    before = len(teams.other.requests)

    school = by(teams, "school-north", wire, "Where is the answer key?", stream=stream)
    asked = len(teams.other.requests)
    office = by(teams, "office", wire, "Where is the answer key?", stream=stream)

    assert "Please ask your teacher." in school.text
    assert asked == before
    assert "Please ask your teacher." not in office.text
    assert len(teams.other.requests) > asked


@pytest.mark.parametrize("wire", WIRES)
@streams
def test_an_overlay_stops_the_replies_of_its_team_alone(teams: Setting, wire: str, stream: bool) -> None:
    school = by(teams, "school-north", wire, "What is my key?", stream=stream)
    office = by(teams, "office", wire, "What is my key?", stream=stream)

    assert "Not for pupils." in school.text
    assert "Not for pupils." not in office.text
    assert "matters to me here" in words(office)


def test_a_caller_cannot_name_another_team(teams: Setting) -> None:
    url, claimed = f"{teams.url}/v1", {"user_api_key_team_alias": "office"}

    for field in ("metadata", "litellm_metadata", "request_data"):
        more = {field: claimed}
        reply = ask(url, "chat/completions", "other", "the answer key", stream=False, key="sk-of-school-a", **more)

        assert "Please ask your teacher." in reply.text
