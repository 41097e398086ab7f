"""Policies are taken over whole when their files change, or not at all."""

import threading
import time
from pathlib import Path

import pytest

from hhh_router.errors import PolicyError
from hhh_router.pipeline import PolicyStore

TEXT = """\
version: {version}
name: desk
description: version {version}
weights: {{helpful: 1, harmless: 1, honest: 1}}
strength: {strength}
checkpoints:
  input: [{{when: {{needs.harmless: ">= {strength}"}}, then: refuse}}, {{then: allow}}]
  output: [{{then: allow}}]
"""


def write(path: Path, version: int, strength: float = 0.5) -> Path:
    beside = path.with_suffix(".new")
    beside.write_text(TEXT.format(version=version, strength=strength))
    return beside.replace(path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "desk.yaml", 1)


def until(true, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.005)
    return False


def test_a_changed_file_is_taken_over_and_its_version_shows(file: Path):
    store = PolicyStore(file)
    before = store.default
    write(file, 2)

    assert store.default is before
    assert store.reload()

    assert (store.default.version, store.status.generation, store.status.error) == (2, 2, None)
    assert store.status.policies["desk"] == f"2 {store.default.hash}"
    assert before.version == 1  # whoever began with it goes on with it


@pytest.mark.parametrize("text", ["", "version: 2\nname: desk\n", "version: 2\nname: desk\nextends: gone.yaml\n"])
def test_of_a_file_that_is_wrong_the_last_good_one_stays(file: Path, text: str, caplog: pytest.LogCaptureFixture):
    store = PolicyStore(file, allowed=("harmless-first",))
    before = store.default
    file.write_text(text)

    assert not store.reload()

    assert store.default is before
    assert str(file) in (store.status.error or "")
    assert "those before stay in force" in caplog.text
    write(file, 3)
    assert store.reload()
    assert (store.default.version, store.status.error) == (3, None)


def test_one_wrong_file_keeps_all_of_them_back(tmp_path: Path, file: Path):
    other = tmp_path / "other.yaml"
    other.write_text(TEXT.format(version=1, strength=0.5).replace("desk", "other"))
    store = PolicyStore(file, allowed=(str(other),))
    write(file, 2)
    other.write_text("broken")

    assert not store.reload()

    assert (store.get("desk").version, store.get("other").version) == (1, 1)


def test_a_change_that_asks_what_the_door_lacks_is_not_taken_over(file: Path):
    store = PolicyStore(file)
    file.write_text(TEXT.format(version=2, strength=0.5) + "overlays: [{tenants: a}]\n")

    assert not store.reload()
    assert "does not know whose traffic it is" in (store.status.error or "")


def test_files_are_looked_at_when_it_is_time_and_what_they_extend_too(tmp_path: Path, file: Path):
    child = tmp_path / "child.yaml"
    child.write_text("version: 1\nname: child\nextends: desk.yaml\n")
    now = [0.0]
    store = PolicyStore(child, reload_s=10, clock=lambda: now[0])
    write(file, 2, strength=0.7)

    assert store.default.strength == 0.5
    now[0] = 9.9
    assert store.default.strength == 0.5
    now[0] = 10.0
    assert store.default.strength == 0.5  # the look is begun, and this request does not wait for it
    assert until(lambda: store.default.strength == 0.7)


def test_files_that_did_not_change_are_not_read_again(file: Path):
    now = [0.0]
    store = PolicyStore(file, reload_s=1, clock=lambda: now[0])
    first = store.default
    store.get("harmless-first") if "harmless-first" in store.names else None
    now[0] = 5.0

    assert store.default is first
    time.sleep(0.1)
    assert store.status.generation == 1


def test_a_store_that_never_looks_again_never_does(file: Path):
    store = PolicyStore(file)
    write(file, 2)

    assert store.default.version == 1


def test_no_request_sees_half_a_policy_while_files_change(file: Path):
    store = PolicyStore(file)
    stop = threading.Event()
    seen: set[tuple[int, float, object]] = set()

    def ask() -> None:
        while not stop.is_set():
            policy = store.get(None)
            seen.add((policy.version, policy.strength, policy.checkpoints["input"][0].when[0].value))

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    for i in range(30):
        write(file, 1 + i % 2, strength=0.5 if i % 2 == 0 else 0.75)
        store.reload()
    stop.set()
    for asker in askers:
        asker.join()

    assert seen <= {(1, 0.5, 0.5), (2, 0.75, 0.75)}
    assert len(seen) == 2


def test_a_start_with_a_wrong_file_fails(tmp_path: Path):
    (tmp_path / "p.yaml").write_text("broken")

    with pytest.raises(PolicyError):
        PolicyStore(tmp_path / "p.yaml")
