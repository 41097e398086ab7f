"""Secrets in files, beside the environment."""

import os
from pathlib import Path

import pytest

from hhh_router.errors import SettingsError
from hhh_router.interfaces.proxy.config import make_config, parse_proxy_file
from hhh_router.settings import Settings, read_secret

PROXY = b"""\
version: 1
upstreams: {main: {url: "https://api.example/v1", api_key_env: PROVIDER_KEY}}
routes: [{to: main}]
"""


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("HHH_ROUTER_API_KEY", raising=False)
    monkeypatch.setenv("HHH_ROUTER_SECRETS_DIR", str(tmp_path))
    return tmp_path


def test_a_setting_is_read_from_the_file_of_its_name(secrets: Path) -> None:
    (secrets / "HHH_ROUTER_API_KEY").write_text("from-a-file\n")
    (secrets / "HHH_ROUTER_ALLOWED_POLICIES").write_text("strict, balanced\n")

    settings = Settings.load()

    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "from-a-file"
    assert settings.allowed_policies == ("strict", "balanced")


def test_the_environment_and_keywords_count_more_than_files(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (secrets / "HHH_ROUTER_THREADS").write_text("3")
    (secrets / "HHH_ROUTER_MAX_ROWS").write_text("3")
    monkeypatch.setenv("HHH_ROUTER_THREADS", "2")

    settings = Settings.load(max_rows=5)

    assert (settings.threads, settings.max_rows) == (2, 5)


def test_systemds_folder_of_credentials_is_one(tmp_path: Path) -> None:
    (tmp_path / "PROVIDER_KEY").write_text("k\n")

    config = make_config(parse_proxy_file(PROXY), environ={"CREDENTIALS_DIRECTORY": str(tmp_path)})

    assert config.routes[0].to[0][0].headers == {"authorization": "Bearer k"}


def test_a_key_that_is_nowhere_is_missed_with_both_places_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        make_config(parse_proxy_file(PROXY), environ={"HHH_ROUTER_SECRETS_DIR": str(tmp_path)})

    assert "PROVIDER_KEY: not set" in str(caught.value)
    assert "HHH_ROUTER_SECRETS_DIR" in str(caught.value)


def test_a_mistake_in_a_file_is_told_as_in_a_variable(secrets: Path) -> None:
    (secrets / "HHH_ROUTER_THREADS").write_text("many")

    with pytest.raises(SettingsError, match=r"HHH_ROUTER_THREADS: .*found 'many'"):
        Settings.load()


def test_a_folder_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HHH_ROUTER_SECRETS_DIR", "/nowhere")

    with pytest.raises(SettingsError, match="HHH_ROUTER_SECRETS_DIR: /nowhere is no folder"):
        Settings.load()


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "KEY").write_bytes(b"\xff\xfe")

    with pytest.raises(SettingsError, match=r"KEY cannot be read \(it is no UTF-8\)"):
        read_secret("KEY", {"HHH_ROUTER_SECRETS_DIR": str(tmp_path)})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "KEY").touch(mode=0o000)

    with pytest.raises(SettingsError, match=r"KEY cannot be read \(Permission denied\)"):
        read_secret("KEY", {"HHH_ROUTER_SECRETS_DIR": str(tmp_path)})
