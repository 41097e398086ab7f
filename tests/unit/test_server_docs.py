"""docs/server.md says what the server does."""

import re
from pathlib import Path

from starlette.routing import Route

from hhh_router.interfaces.server.app import create_app
from hhh_router.interfaces.server.endpoints import ENDPOINTS
from hhh_router.interfaces.server.models import MODEL_NAMES, parse_model
from hhh_router.interfaces.server.openai import NEUTRAL_VALUES, READ_FIELDS
from hhh_router.testing import fake_pipeline

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "server.md").read_text(encoding="utf-8")


def test_the_endpoints_are_those_of_the_page() -> None:
    app = create_app(fake_pipeline())
    served = {
        f"{method} {r.path}" for r in app.routes if isinstance(r, Route) for method in (r.methods or ()) - {"HEAD"}
    }

    assert set(re.findall(r"^\| `((?:GET|POST) [^`]+)`", PAGE, flags=re.MULTILINE)) == served


def test_the_page_and_the_openapi_document_say_the_same_of_each() -> None:
    rows = re.findall(r"^\| `((?:GET|POST) [^`]+)` \| (.+) \| (yes|no) \|$", PAGE, flags=re.MULTILINE)

    assert sorted(rows) == sorted((f"{e.method} {e.path}", e.does, "yes" if e.needs_key else "no") for e in ENDPOINTS)


def test_every_model_name_of_the_page_is_one() -> None:
    named = re.findall(r"`(hhh(?:-|@)[a-z0-9:-]+)`", PAGE)

    assert set(MODEL_NAMES) <= set(named)
    for name in named:
        parse_model(name)


def test_every_field_that_is_read_or_refused_is_on_the_page() -> None:
    in_groups = {"presence_penalty", "frequency_penalty", "audio", "modalities", "tool_choice", "function_call"}
    in_groups |= {"top_logprobs", "stream_options", "model", "hhh"}

    for field in (READ_FIELDS | set(NEUTRAL_VALUES)) - in_groups:
        assert f"`{field}`" in PAGE, field
