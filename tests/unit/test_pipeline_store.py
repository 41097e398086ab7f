from pathlib import Path

import pytest

from hhh_router.errors import PolicyError, PolicyNotAllowed
from hhh_router.pipeline import PolicyStore

STRICT = """\
version: 7
name: strict
weights: {helpful: 1, harmless: 1, honest: 1}
strength: 0.5
checkpoints:
  input: [{then: allow}]
  output: [{then: allow}]
"""


@pytest.fixture
def strict(tmp_path: Path) -> Path:
    path = tmp_path / "strict.yaml"
    path.write_text(STRICT)
    return path


def test_every_shipped_policy_may_be_picked_unless_a_list_is_given() -> None:
    store = PolicyStore("balanced")

    assert store.names[0] == "balanced"
    assert {"helpful-first", "harmless-first", "honest-first"} < set(store.names)
    assert store.get("honest-first").name == "honest-first"
    assert store.get(None) is store.get("balanced") is store.default


def test_only_listed_policies_may_be_picked(strict: Path) -> None:
    store = PolicyStore(strict, allowed=("harmless-first",))

    assert store.names == ["strict", "harmless-first"]
    assert store.get(None).version == 7
    with pytest.raises(PolicyNotAllowed, match="use one of strict, harmless-first"):
        store.get("balanced")


def test_a_caller_cannot_name_a_file(strict: Path) -> None:
    store = PolicyStore("balanced")

    with pytest.raises(PolicyNotAllowed, match="cannot be picked here"):
        store.get(str(strict))


def test_the_process_itself_may_add_a_file_which_is_loaded_once(strict: Path) -> None:
    store = PolicyStore("balanced")

    name = store.add_file(strict)
    first = store.get(name)
    strict.write_text("broken")

    assert store.get(store.add_file(strict)) is first


def test_a_wrong_policy_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(PolicyError):
        PolicyStore(tmp_path / "missing.yaml")
    with pytest.raises(PolicyError):
        PolicyStore("balanced", allowed=("no-such-policy",))
