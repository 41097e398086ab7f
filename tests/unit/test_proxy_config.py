"""proxy.yaml: every mistake with its line, and what a right one means."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from hhh_router.errors import MissingExtra, SettingsError
from hhh_router.interfaces.proxy.config import make_config, parse_proxy_file, read_proxy_file, simple_config
from hhh_router.pipeline.situation import SIDECAR
from hhh_router.policy import lacking, parse_policy
from hhh_router.settings import Settings

GOOD = """\
version: 1
mode: observe
upstreams:
  main: {url: "https://api.example/v1", api_key_env: KEY, retries: 2, timeouts: {first_byte_s: 60}}
  backup: {url: "http://backup:9000", breaker: {after: 2, pause_s: 3}}
routes:
  - name: chat
    paths: ["/v1/chat/*"]
    to: [{upstream: main, weight: 9}, {upstream: backup}]
    fallback: [backup, hhh]
  - {to: main, mode: enforce, policy: strict, escalate_to: backup}
audit: {path: audit.sqlite3, on_failure: open, redact: ['CASE-\\d+']}
"""


def test_a_right_file_means_what_it_says() -> None:
    config = make_config(parse_proxy_file(GOOD.encode()), environ={"KEY": "k"})

    first, second = config.routes
    assert (first.name, first.mode, [(u.name, w) for u, w in first.to]) == (
        "chat", "observe", [("main", 9.0), ("backup", 1.0)]
    )  # fmt: skip
    assert ([u.name for u in first.fallback], first.answer_here) == (["backup"], True)
    assert (second.name, second.mode, second.policy) == ("routes[1]", "enforce", "strict")
    assert second.escalate_to is not None
    main = first.to[0][0]
    assert (main.headers, main.retries, main.timeouts.first_byte_s) == ({"authorization": "Bearer k"}, 2, 60)
    assert config.audit_failure == "open"
    assert "Bearer" not in repr(main)


def test_a_hedge_names_an_upstream_and_when() -> None:
    raw = GOOD.replace("escalate_to: backup", "hedge: {after_ms: 800, to: backup}")
    hedge = make_config(parse_proxy_file(raw.encode()), environ={"KEY": "k"}).routes[1].hedge

    assert hedge is not None
    assert (hedge.after_s, hedge.to.name) == (0.8, "backup")


def test_the_command_lines_mode_holds_for_every_route() -> None:
    config = make_config(parse_proxy_file(GOOD.encode()), environ={"KEY": "k"}, mode="annotate")

    assert {r.mode for r in config.routes} == {"annotate"}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("mode: observe", "mode: obsreve", "2  mode: found 'obsreve'; input should be 'observe', 'annotate' or"),
        ("version: 1", "version: 2", "1  version: found 2; input should be 1"),
        ("https://api.example/v1", "api.example", "4  upstreams.main.url: found 'api.example'; an http(s) URL"),
        ("https://api", "https://me:pw@api", "4  upstreams.main.url: found"),
        ("retries: 2", "retires: 2", "4  upstreams.main.retires: not a key here, did you mean retries?"),
        ("retries: 2", "retries: many", "4  upstreams.main.retries: found 'many'; input should be a valid integer"),
        ("first_byte_s: 60", "first_byte_s: 0", "4  upstreams.main.timeouts.first_byte_s: found 0; input should be"),
        ("escalate_to: backup", "hedge: {after_ms: 0, to: backup}", "11  routes[1].hedge.after_ms: found 0; input"),
        ("escalate_to: backup", "hedge: {after_ms: 9, to: bakup}", "11  routes[1].hedge.to: 'bakup' is no upstream"),
        ("upstream: main, weight: 9", "upstream: mian", "9  routes[0].to[0].upstream: 'mian' is no upstream, did you"),
        ("fallback: [backup, hhh]", "fallback: [hh]", "10  routes[0].fallback[0]: 'hh' is no upstream"),
        ("to: main, mode", "to: nobody, mode", "11  routes[1].to: 'nobody' is no upstream"),
        ("escalate_to: backup", "escalate_to: hhh", "11  routes[1].escalate_to: 'hhh' is no upstream"),
        ("'CASE-\\d+'", "'CASE-['", "12  audit.redact[0]: no regular expression"),
        ("  backup:", "  hhh:", "5  upstreams.hhh: 'hhh' is the own mixture's name"),
        ("audit: {path", "hold: {wait_s: 0}\naudit: {path", "12  hold.wait_s: found 0; input should be greater"),
        ("audit: {path", "hold: {wait: 9}\naudit: {path", "12  hold.wait: not a key here, did you mean wait_s?"),
        ("audit: {path", "hold: {webhook: mailto:x}\naudit: {path", "12  hold.webhook: found 'mailto:x'; an http(s)"),
        ("audit: {path", "hold: {path: ''}\naudit: {path", "12  hold.path: found ''; string should have at least 1"),
        ("routes:", "routes: &x", "6  file: anchor"),
        ("weight: 9}, {upstream: backup}", "weight: 0}", "9  routes[0].to: no target has a weight"),
        ("mode: observe", "mode: observe\nmode: enforce", "3  file: 'mode' is here twice"),
        ('url: "http://backup:9000", ', "", "5  upstreams.backup: one of url and litellm is meant"),
        ("breaker: {after", "litellm: gemini/x, breaker: {after", "5  upstreams.backup: url and litellm exclude"),
        ('url: "http://backup:9000"', "litellm: gpt-4o", "5  upstreams.backup.litellm: found 'gpt-4o'; provider/model"),
        ('url: "http://backup:9000"', "litellm: a/b, model: c", "5  upstreams.backup.model: does not go with litellm"),
        ("retries: 2", "drop_params: true", "4  upstreams.main.drop_params: does not go with url"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_line(old: str, new: str, told: str) -> None:
    with pytest.raises(SettingsError) as raised:
        parse_proxy_file(GOOD.replace(old, new).encode(), source="p.yaml")

    assert f"p.yaml:{told}" in raised.value.message
    assert raised.value.hint is not None
    assert "docs/proxy.md" in raised.value.hint


def test_where_calls_wait_is_read() -> None:
    text = GOOD + "hold: {path: q.sqlite3, wait_s: 9, webhook: 'https://chat.example/hook?t=1'}\n"
    config = make_config(parse_proxy_file(text.encode()), environ={"KEY": "k"})

    assert (str(config.hold_path), config.hold_s) == ("q.sqlite3", 9.0)
    assert config.hold_webhook == "https://chat.example/hook?t=1"


def test_all_mistakes_are_told_at_once() -> None:
    text = GOOD.replace("mode: observe", "mode: x").replace("retries: 2", "retires: 2")

    with pytest.raises(SettingsError) as raised:
        parse_proxy_file(text.encode())

    assert [line.split("  ")[0] for line in raised.value.message.splitlines()] == ["proxy.yaml:2", "proxy.yaml:4"]


def test_a_key_that_is_not_there_is_named_and_a_file_too(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="KEY: not set"):
        make_config(parse_proxy_file(GOOD.encode()), environ={})
    with pytest.raises(SettingsError, match=r"nope\.yaml:1  file: cannot be read"):
        read_proxy_file(tmp_path / "nope.yaml")


def test_one_upstream_needs_no_file() -> None:
    settings = Settings.load(upstream_api_key="sk-1")
    config = simple_config("http://host/v1", settings, mode="annotate")

    [route] = config.routes
    assert (route.mode, route.to[0][0].url) == ("annotate", "http://host/v1")
    assert "sk-1" not in repr(route)


def test_the_example_of_the_page_is_right() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "proxy.md").read_text(encoding="utf-8")
    policy, example, translated = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)

    config = make_config(parse_proxy_file(example.encode()), environ={"OPENAI_API_KEY": "a", "ANTHROPIC_API_KEY": "b"})

    assert [r.name for r in config.routes] == ["messages", "cheap", "rest"]
    assert config.routes[2].answer_here
    file = parse_proxy_file(f"version: 1\n{translated}routes: [{{to: gem}}]\n".encode())
    assert file.upstreams["gem"].litellm == "gemini/gemini-2.5-flash"
    assert lacking(parse_policy(policy), SIDECAR) == []


TRANSLATED = GOOD.replace('url: "http://backup:9000"', "litellm: gemini/gemini-2.5-flash")


@pytest.mark.skipif(find_spec("litellm") is not None, reason="LiteLLM is installed here")
def test_a_translated_upstream_without_litellm_is_told_with_its_line() -> None:
    file = parse_proxy_file(TRANSLATED.encode(), source="p.yaml")

    with pytest.raises(MissingExtra, match=r"p\.yaml:5  upstreams\.backup\.litellm needs the 'litellm'") as raised:
        make_config(file, environ={"KEY": "k"})

    assert raised.value.hint == "pip install 'hhh-router[litellm]'"


@pytest.mark.skipif(find_spec("litellm") is not None, reason="LiteLLM is installed here")
def test_a_translated_upstream_of_the_command_line_needs_litellm_too() -> None:
    with pytest.raises(MissingExtra, match=r"--upstream litellm:gemini/gemini-2\.5-flash needs the 'litellm' extra"):
        simple_config("litellm:gemini/gemini-2.5-flash", Settings())
