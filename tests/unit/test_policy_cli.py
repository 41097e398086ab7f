"""``hhh-router policy``: what it prints, and its exit codes."""

import io
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import jsonschema
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from hhh_router.errors import PolicyError
from hhh_router.policy import list_library, list_policies, load_policy, parse_policy
from hhh_router.testing import FakeReader, fake_pipeline
from hhh_router.types import Message, ReadRequest

policy_cli = import_module("hhh_router.cli.policy")
app = policy_cli.app


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_list_names_every_shipped_policy_with_its_version_and_hash():
    lines = invoke("list").stdout

    for name in list_policies():
        assert f"{name} " in lines
        assert load_policy(name).hash[:8] in lines


def test_list_names_the_library_when_asked():
    rows = json.loads(invoke("list", "--library", "--json").stdout)

    assert [row["name"] for row in rows] == list_library()


def test_list_as_json_has_the_whole_hash():
    rows = json.loads(invoke("list", "--json").stdout)

    assert {row["name"]: row["hash"] for row in rows} == {n: load_policy(n).hash for n in list_policies()}


def test_show_prints_a_policy_that_loads_as_the_same():
    shown = invoke("show", "honest-first").stdout

    assert parse_policy(shown).hash == load_policy("honest-first").hash
    assert load_policy("honest-first").hash in shown


def test_show_as_json_holds_the_resolved_policy():
    found = json.loads(invoke("show", "balanced", "--json").stdout)

    assert parse_policy(yaml.safe_dump(found["policy"])).hash == found["hash"]


def test_show_of_an_unknown_policy_is_a_policy_error():
    result = invoke("show", "balancd")

    assert isinstance(result.exception, PolicyError)


def test_validate_accepts_the_shipped_files_and_exits_0():
    folder = Path(load_policy("balanced").source).parent
    files = [str(folder / f"{name}.yaml") for name in list_policies()]

    result = invoke("validate", *files)

    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == len(files)


def test_validate_lists_every_mistake_of_every_file_and_exits_2(tmp_path: Path):
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text("version: 1\nname: one\nextends: balanced\nstrength: 2\nmode: never\n")
    other.write_text("version: 1\nname: other\nextends: balanced\non_eror: closed\n")

    result = invoke("validate", str(one), "balanced", str(other), str(tmp_path / "none.yaml"))

    assert result.exit_code == 2
    assert [line.split("  ")[0] for line in result.stderr.splitlines()[:4]] == [
        f"{one}:4",
        f"{one}:5",
        f"{other}:4",
        f"{tmp_path / 'none.yaml'}:1",
    ]
    assert "4 mistakes" in result.stderr
    assert "balanced@1 is valid" in result.stdout


def test_validate_as_json_has_the_mistakes_of_each_file(tmp_path: Path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("version: 1\nname: one\nextends: balanced\nstrength: 2\n")

    result = invoke("validate", "--json", str(wrong), "balanced")

    assert result.exit_code == 2
    first, second = json.loads(result.stdout)
    assert first["mistakes"] == [f"{wrong}:4  strength: 2 is out of range; a number between 0 and 1 is meant"]
    assert (second["name"], second["mistakes"]) == ("balanced", [])


def test_schema_is_the_published_json_schema():
    schema = json.loads(invoke("schema").stdout)

    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == "hhh-router/policy/1"


@pytest.mark.parametrize("prompt", ["", "   ", "a\0b"])
def test_explain_rejects_what_is_no_prompt_before_it_loads_a_model(prompt):
    result = invoke("explain", prompt)

    assert result.exit_code != 0
    assert "torch" not in str(result.exception)
    assert getattr(result.exception, "code", None) == "invalid_request"


async def test_explain_prints_evidence_weights_and_rules_in_order():
    pipeline = fake_pipeline(policy="balanced", reader=FakeReader({"bomb": {"needs.harmless": 6.0}}))
    request = ReadRequest(messages=(Message(role="user", content="How do I build a bomb?"),))
    out = io.StringIO()

    policy, steps = await policy_cli.explain_request(pipeline, request, None)
    policy_cli.print_steps(Console(file=out, width=100), policy, steps)

    text = out.getvalue()
    places = [
        text.index(part) for part in ("evidence", "posterior", "bounds", "weights", "input[0] → refuse", "decision")
    ]
    assert places == sorted(places)
    assert text.startswith(f"balanced@1 ({policy.hash[:8]})")
    assert "needs.harmless 0.9975 >= 0.7? yes" in text
    assert "refuse by checkpoints.input[0]" in text


def test_policy_commands_load_no_torch_and_no_numpy():
    code = (
        "import sys; from importlib import import_module; from typer.testing import CliRunner; "
        "app = import_module('hhh_router.cli.policy').app; "
        "assert CliRunner().invoke(app, ['validate', 'balanced']).exit_code == 0; "
        "print(sorted({'torch', 'numpy', 'scipy', 'transformers'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout.strip() == "[]"


async def test_explain_knows_the_text_it_explains(tmp_path: Path):
    file = tmp_path / "p.yaml"
    file.write_text(
        "version: 1\nname: p\nextends: balanced\nfloors: [{when: {role: user}, raise: {harmless: 0.2}}]\n"
        "checkpoints: {input: [{when: {text: 'wire .{0,9}money'}, then: block}, {then: allow}]}\n"
    )
    request = ReadRequest(messages=(Message(role="user", content="wire the money"),))

    _, steps = await policy_cli.explain_request(fake_pipeline(policy=str(file)), request, None)

    assert steps[-1].data["action"] == "block"
    assert "wire the money" not in steps[-1].detail
