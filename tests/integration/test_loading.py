"""Where a bundle is loaded."""

import threading

import pytest

from hhh_router.bundle import Bundle
from hhh_router.model import worker
from hhh_router.model.worker import load_embedded
from hhh_router.settings import Settings

pytestmark = pytest.mark.integration


def test_the_thread_that_loads_is_not_the_callers_and_leaves_with_its_team(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded_by: list[threading.Thread] = []
    original = worker.open_reader

    def watched(*given: object) -> object:
        loaded_by.append(threading.current_thread())
        return original(*given)

    monkeypatch.setattr(worker, "open_reader", watched)

    model = load_embedded(tiny, Settings.load(bundle=str(tiny.root)))

    (thread,) = loaded_by
    assert thread is not threading.current_thread()
    assert not thread.is_alive()
    model.engine.close()
