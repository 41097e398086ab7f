"""A candidate beside the policy of a sidecar: in the audit and in the figures, and not in what clients get."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hhh_router.cli.main import app as command
from hhh_router.interfaces.proxy.config import make_config, parse_proxy_file
from hhh_router.pipeline.situation import SIDECAR
from hhh_router.testing import FakeReader, fake_pipeline
from hhh_router.trace.audit import SqliteAudit, read_rows

from .loopback import served_app
from .sidecars import Stub, ask, route_to, sidecar
from .test_sidecar_guarded import Model, user

pytestmark = pytest.mark.e2e

Policies = Callable[..., Path]
RULES = {"knife": {"needs.harmless": 0.5}, "trouble": {"outcomes.unsafe": 6.0}}
STRICTER = """\
version: 1
name: stricter
weights: {helpful: 1, harmless: 1, honest: 1}
strength: 0.5
checkpoints:
  input:
    - {when: {needs.harmless: ">= 0.6", headers.x-team: [blue]}, then: refuse}
    - {then: allow}
  output: [{then: allow}]
"""


@pytest.mark.parametrize("mode", ["enforce", "annotate", "observe"])
@pytest.mark.parametrize("of_route", [True, False], ids=["route", "deployment"])
def test_the_audit_has_the_candidate_and_the_client_does_not(
    watchful: Policies, tmp_path: Path, mode: str, of_route: bool
) -> None:
    candidate = tmp_path / "stricter.yaml"
    candidate.write_text(STRICTER)
    audit = SqliteAudit(tmp_path / "audit.sqlite3")
    reader = FakeReader(RULES)
    own = {} if of_route else {"candidate": str(candidate)}
    pipeline = fake_pipeline(watchful(), reader=reader, door=SIDECAR, **own)
    if of_route:
        pipeline.policies.add_candidate(candidate)
    with served_app(Stub(Model())) as upstream:
        route = route_to(upstream.removesuffix("/v1"), mode=mode, candidate=str(candidate) if of_route else None)
        with sidecar(route, pipeline=pipeline, audit=audit) as (url, _):
            status, headers, raw = ask(
                url,
                body={"model": "big", "messages": [user("a knife")]},
                headers=[("Content-Type", "application/json"), ("x-team", "blue")],
            )
            shown = None
            if mode != "observe":
                shown = CliRunner().invoke(command, ["policy", "compare", "--url", f"{url}/hhh", "--json"])

    assert (status, b"candidate" in raw) == (200, False)
    assert not any("candidate" in name.lower() for name, _ in headers)
    kind = "verdict" if mode == "observe" else "outcome"
    record = next(json.loads(row.record) for row in read_rows(tmp_path / "audit.sqlite3") if row.kind == kind)
    found = record["hhh"]["candidate"]
    assert (found["policy"]["name"], found["relation"]) == ("stricter", "stricter")
    assert found["compared"][0] == {"checkpoint": "input", "enforced": "allow", "candidate": "refuse"}
    if shown is not None:
        assert shown.exit_code == 0, shown.output
        told = json.loads(shown.output)
        assert told["comparisons"][0]["disagreements"][0] == {
            "checkpoint": "input", "enforced": "allow", "candidate": "refuse", "n": 1,
        }  # fmt: skip
        assert {f["name"] for f in told["figures"]} >= {"candidate_stricter", "candidate_looser"}


def test_proxy_yaml_names_candidates_for_all_and_for_a_route() -> None:
    file = parse_proxy_file(
        b"version: 1\npolicy: balanced\ncandidate: harmless-first\nupstreams: {a: {url: 'http://a'}}\n"
        b"routes: [{policy: balanced, candidate: strict.yaml, to: a}, {to: a}]\n"
    )

    assert file.candidate == "harmless-first"
    assert [r.candidate for r in make_config(file).routes] == ["strict.yaml", None]
