"""docs/mcp.md says what the proxy does."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("mcp")

from typer.testing import CliRunner

from hhh_router.cli.main import app
from hhh_router.interfaces.held import MAX_ARGUMENT_BYTES
from hhh_router.interfaces.mcp.checks import MCP, check_policy
from hhh_router.interfaces.mcp.reading import MAX_CHARACTERS, PIECE_CHARACTERS, READ_S
from hhh_router.policy import parse_policy
from hhh_router.settings import Settings

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "mcp.md").read_text(encoding="utf-8")


def test_the_policy_to_begin_with_is_one_that_this_door_carries_out() -> None:
    [text] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)

    check_policy(parse_policy(text))


def test_the_client_configuration_is_valid_and_names_options_that_exist() -> None:
    [text] = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    server = json.loads(text)["mcpServers"]["files"]
    own = server["args"][: server["args"].index("--")]

    help_text = CliRunner().invoke(app, [own[0], "--help"]).stdout

    assert server["command"] == "hhh-router"
    assert all(option in help_text for option in own if option.startswith("--"))


def test_every_fact_and_number_of_the_page_is_that_of_the_code() -> None:
    facts = PAGE.split("## In ten lines")[1].split("## What is asked")[0]

    assert all(f"`{fact}`" in facts for fact in MCP.supplies - {"rollout"})
    for number in (MAX_CHARACTERS, PIECE_CHARACTERS, MAX_ARGUMENT_BYTES):
        assert f"{number:,}" in PAGE
    assert f"({READ_S:g} s)" in PAGE
    assert f"seconds ({Settings.model_fields['hold_s'].default:g};" in PAGE
