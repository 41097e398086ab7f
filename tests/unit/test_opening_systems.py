"""What ``--system`` names, and what of it is refused before anything runs."""

from pathlib import Path
from typing import Any

import pytest

from hhh_router.data.examples import Example, ask
from hhh_router.errors import HHHRouterError, SettingsError
from hhh_router.evaluation.opening import Opening, open_systems
from hhh_router.settings import Settings
from hhh_router.types import ReadRequest


def prompt(text: str) -> ReadRequest:
    return ReadRequest(messages=ask(text))


def opening(**fields: Any) -> Opening:
    return Opening(**{"settings": Settings.load(), "bundle": "no-such-bundle", "heads": ["harmless"], **fields})


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("bundel:x", "did you mean bundle"),
        ("http://h:8000", "url:http"),
        ("policy:", "names nothing"),
        ("url:nowhere", "no http"),
        ("baseline:tfdif", "did you mean tfidf"),
        ("baseline:tfidf", "--baselines"),
        ("baseline:minilm", "HHH_ROUTER_DATA"),
        ("policy:no-such", "policy 'no-such' not found"),
        ("bundle:no-such", "no-such"),
    ],
)
def test_what_cannot_be_opened_is_refused_before_anything_runs(spec: str, found: str) -> None:
    with pytest.raises(HHHRouterError) as caught:
        open_systems([spec], opening())

    assert found in str(caught.value)


def test_a_folder_of_data_sets_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such folder"):
        open_systems(["baseline:tfidf"], opening(recipe=tmp_path / "r.yaml", data=tmp_path / "sets"))


def test_jailguard_needs_no_recipe_and_two_urls_are_two_systems() -> None:
    systems = open_systems(["baseline:jailguard", "url:http://a:1", "url:http://b:2/v1/moderations"], opening())

    assert [s.name for s in systems] == ["jailguard", "http://a:1", "http://b:2/v1/moderations"]


def test_tf_idf_learns_a_recipes_rows_for_the_labels_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    things = ("boat", "lamp", "fence", "clock", "well", "bridge", "garden", "letter")
    learned = [
        Example(source="x", split="train", messages=ask(f"{verb} the {thing}"), needs={"harmless": y, "honest": 1 - y})
        for thing in things
        for verb, y in (("paint", 0.0), ("repair", 0.0), ("poison", 1.0), ("steal", 1.0))
    ]
    monkeypatch.setattr("hhh_router.training.mix.draw", lambda shares, root, *, seed: learned)
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "smollm2-135m.yaml"

    [system] = open_systems(["baseline:tfidf"], opening(recipe=recipe, data=tmp_path))
    p = system.probabilities([prompt("poison it"), prompt("paint it")], "harmless")

    assert p is not None
    assert p[0] > 0.5 > p[1]
    assert system.probabilities([prompt("poison it")], "honest") is None  # the file has no such label
    assert "smollm2-135m.yaml" in system.note


def test_two_systems_of_one_name_are_told_apart() -> None:
    systems = open_systems(["url:http://a:1", "url:http://a:1/v1"], opening())

    assert [s.name for s in systems] == ["http://a:1", "http://a:1 (2)"]


@pytest.mark.parametrize(
    ("urls", "given", "environ", "found"),
    [
        (["http://a:1"], ["KEY"], {}, "KEY: the variable is not set"),
        (["http://a:1"], ["sk-abc-123"], {}, "name of a variable, not a key"),
        (["http://a:1"], ["KEY"], {"KEY": "a\nb"}, "line break"),
        (["http://a:1", "http://b:2"], ["KEY"], {"KEY": "k"}, "HOST=NAME, such as a:1=KEY"),
        (["http://a:1"], ["c:3=KEY"], {"KEY": "k"}, "no --system asks c:3"),
        ([], ["KEY"], {"KEY": "k"}, "0 hosts"),
    ],
)
def test_a_key_that_is_for_nobody_is_refused(
    urls: list[str], given: list[str], environ: dict[str, str], found: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        open_systems([f"url:{u}" for u in urls] or ["baseline:jailguard"], opening(api_key_env=given, environ=environ))

    assert found in str(caught.value)
    assert "sk-abc" not in str(caught.value)


def test_each_host_gets_its_own_key_and_no_other() -> None:
    a, b, c = open_systems(
        ["url:http://a:1", "url:http://b:2", "url:http://c:3"],
        opening(api_key_env=["a:1=ONE", "b:2=TWO"], environ={"ONE": "1", "TWO": "2"}),
    )

    keys = [s._client._api_key for s in (a, b, c)]  # type: ignore[attr-defined]
    assert [k and k.get_secret_value() for k in keys] == ["1", "2", None]
