"""Where an audit may be, and what is told of the place."""

import sys
from pathlib import Path

import pytest

from hhh_router.errors import MissingExtra, SettingsError
from hhh_router.evaluation.recorded import recorded_source
from hhh_router.interfaces.proxy.open import plan_sidecar
from hhh_router.testing import fake_pipeline
from hhh_router.trace.audit import NoAudit, check_place, default_audit, open_audit, read_rows, shown_place, verify

URL = "postgresql://me:canaryPASSWORD@db.example:5433/hhh?sslmode=require"


@pytest.mark.parametrize("url", [URL, "postgres://db/x?password=canaryPASSWORD", "postgresql://me:canaryPASSWORD@/x"])
def test_a_password_is_refused_where_others_would_read_it(url: str) -> None:
    with pytest.raises(SettingsError, match="holds a password") as raised:
        check_place(url)

    assert "HHH_ROUTER_AUDIT_URL" in str(raised.value)
    assert "canary" not in str(raised.value)


@pytest.mark.parametrize("place", ["a.sqlite3", "none", "postgresql://me@db.example/hhh", "/x/postgresql:/y"])
def test_what_holds_none_is_taken(place: str) -> None:
    check_place(place)


def test_another_kind_of_database_is_told() -> None:
    with pytest.raises(SettingsError, match="cannot be kept at mysql://"):
        check_place("mysql://me:canary@db/x")


def test_of_a_url_only_host_and_database_are_shown() -> None:
    assert shown_place(URL) == "postgresql://db.example:5433/hhh"
    assert shown_place("postgresql:///hhh?host=/run/postgresql&password=canary") == "postgresql:///hhh"
    assert shown_place(Path("/x/a.sqlite3")) == "/x/a.sqlite3"


def test_without_the_driver_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "hhh_router.trace.audit.postgres", raising=False)

    for ask in (open_audit, verify, lambda url: list(read_rows(url))):
        with pytest.raises(MissingExtra, match="'postgres' extra"):
            ask(URL)


def test_none_keeps_nothing() -> None:
    assert isinstance(open_audit("none"), NoAudit)


def test_the_command_line_counts_more_than_the_file_and_the_file_more_than_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "proxy.yaml"
    plain = "version: 1\nupstreams: {a: {url: 'http://a'}}\nroutes: [{to: a}]\n"

    def place(audit: str | None, more: str = "") -> str:
        file.write_text(plain + more)
        plan = plan_sidecar(policy="balanced", bundle=None, upstream=None, config=file, mode=None, audit=audit)
        assert "canary" not in " ".join(plan.told(fake_pipeline()))
        return plan.audit

    assert place(None) == str(default_audit())
    monkeypatch.setenv("HHH_ROUTER_AUDIT_URL", URL)
    assert place(None) == URL
    assert place(None, "audit: {path: from-file.sqlite3}\n") == "from-file.sqlite3"
    assert place("none", "audit: {path: from-file.sqlite3}\n") == "none"
    with pytest.raises(SettingsError, match="holds a password"):
        place(None, f"audit: {{path: '{URL}'}}\n")


def test_the_url_may_be_a_file_among_the_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "HHH_ROUTER_AUDIT_URL").write_text(f"{URL}\n")
    monkeypatch.setenv("HHH_ROUTER_SECRETS_DIR", str(tmp_path))

    plan = plan_sidecar(policy="balanced", bundle=None, upstream="http://a", config=None, mode=None, audit=None)

    assert plan.audit == URL
    assert "canary" not in repr(plan.settings)


def test_a_replay_finds_the_audit_where_the_settings_say() -> None:
    assert recorded_source("audit") == (default_audit(), "audit")
    assert recorded_source("audit", audit_url=URL) == (URL, "audit")
    assert recorded_source("audit:x.sqlite3", audit_url=URL) == (Path("x.sqlite3"), "audit")
    assert recorded_source("audit:postgresql://me@db/hhh") == ("postgresql://me@db/hhh", "audit")
    with pytest.raises(SettingsError, match="holds a password"):
        recorded_source(f"audit:{URL}")
