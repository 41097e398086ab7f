"""The soak itself, for seconds on a tiny model; `make soak` runs it for 20 minutes on the default one."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import faults, main
from hhh_router.bundle import Bundle

pytestmark = pytest.mark.integration
QUIET = {"at_s": 1.0, "memory_bytes": 100 << 20, "rows": 4, "waiting": 4, "slot_tokens": 512}
CLEAN: dict[str, Any] = {
    "samples": [QUIET] * 40,
    "outcomes": {"stop": 10},
    "left": QUIET | {"rows": 0, "waiting": 0, "slot_tokens": 0},
    "restarts": 0,
}


def test_a_short_soak_ends_with_nothing_left(tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HHH_ROUTER_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HHH_ROUTER_THREADS", "1")
    out = tmp_path / "soak.json"

    main(["--minutes", "0.1", "--bundle", str(tiny.root), "--rows", "3", "--most-tokens", "24", "--out", str(out)])

    found = json.loads(out.read_text())
    leaks = [f for f in found["faults"] if not f.startswith("memory grew")]  # six seconds are too few for that one
    assert leaks == []
    assert found["outcomes"]["left"] > 0
    assert found["outcomes"]["read"] > 0
    assert sum(found["outcomes"].get(k, 0) for k in ("stop", "length")) > 0
    assert max(s["rows"] for s in found["samples"]) <= 3
    assert out.with_suffix(".svg").is_file()


def test_nothing_wrong_is_nothing_said() -> None:
    assert faults(CLEAN) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"samples": [QUIET] * 20 + [QUIET | {"memory_bytes": 120 << 20}] * 20}, "memory grew from 100 to 120 MiB"),
        ({"left": QUIET}, "4 rows are left"),
        ({"left": CLEAN["left"] | {"slot_tokens": 128}}, "128 slot_tokens are left"),
        ({"outcomes": {"lost": 1}}, "1 replies ended without saying so"),
        ({"restarts": 1}, "the engine's process died"),
    ],
)
def test_every_leak_is_said(changed: dict[str, Any], said: str) -> None:
    assert said in faults(CLEAN | changed)
