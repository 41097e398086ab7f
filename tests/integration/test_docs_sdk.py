"""The snippets of docs/sdk.md run, in order, on a tiny bundle."""

import re
from pathlib import Path
from typing import Any

import pytest

from hhh_router.bundle import Bundle

pytestmark = pytest.mark.integration

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sdk.md"


def test_every_snippet_of_the_sdk_page_runs(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HHH_ROUTER_BUNDLE", str(tiny.root))
    monkeypatch.setenv("HHH_ROUTER_THREADS", "1")
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, Any] = {"__name__": "docs"}

    for number, snippet in enumerate(snippets, 1):
        exec(compile(snippet, f"docs/sdk.md, snippet {number}", "exec"), names)

    assert len(snippets) == 10
