"""The engine in its own process: it answers alike, and when it dies nothing else does."""

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from hhh_router.bundle import Bundle
from hhh_router.errors import BundleError, ContextTooLong, GeneratorError, Quarantined, Unavailable
from hhh_router.model import supervisor as module
from hhh_router.model.engine import EmbeddedModel
from hhh_router.model.supervisor import Supervisor, open_supervised
from hhh_router.model.worker import load_embedded
from hhh_router.protocols import Delta, Event, Finished, Planned, Planner, Steered, Window
from hhh_router.settings import Settings
from hhh_router.testing.tiny import tiny_bundle
from hhh_router.types import Action, ChatRequest, Plan, ReadRequest, Scores, Weights

from .test_one_pass import ask, events, planner, text_of

pytestmark = pytest.mark.integration
ENDLESS = 8000  # tokens: longer than any of these tests looks at


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With a window that no reply fills while a test looks: 512 tokens may pass between two signs of life."""
    return tiny_bundle(tmp_path_factory.mktemp("tiny"), max_position_embeddings=8192)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings.load(cache_dir=tmp_path_factory.mktemp("cache"), threads=1)


@pytest.fixture(scope="module")
def model(tiny: Bundle, settings: Settings) -> Iterator[EmbeddedModel]:
    """One for all tests that leave a process running; it takes seconds to start."""
    opened = open_supervised(tiny, settings)
    yield opened
    opened.engine.close()


@pytest.fixture
def own_model(tiny: Bundle, settings: Settings) -> Iterator[EmbeddedModel]:
    """For tests that end it."""
    opened = open_supervised(tiny, settings)
    yield opened
    opened.engine.close()


def pid_of(model: EmbeddedModel) -> int:
    assert isinstance(model.engine, Supervisor)
    assert model.engine.pid is not None
    return model.engine.pid


async def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        await asyncio.sleep(0.02)


def endless(text: str) -> ChatRequest:
    return ask(text, max_tokens=ENDLESS, logit_bias={256: -100.0})


async def open_stream(
    model: EmbeddedModel, request: ChatRequest, plan: Planner
) -> tuple[list[Event], asyncio.Task[None]]:
    found: list[Event] = []

    async def read() -> None:
        async for event in model.generator.generate(request, plan, window_tokens=8):
            found.append(event)

    task = asyncio.create_task(read())
    await until(lambda: sum(isinstance(e, Delta) for e in found) >= 2 or task.done())
    return found, task


async def test_it_answers_and_reads_as_the_engine_in_this_process_does(
    model: EmbeddedModel, tiny: Bundle, settings: Settings
) -> None:
    request = ask("tell me something")
    texts = [ReadRequest(messages=request.messages), ReadRequest(messages=request.messages, response="a reply")]
    here = load_embedded(tiny, settings)
    expected, expected_scores = await events(here, request, planner()), await here.reader.read(texts)
    await here.aclose()

    found = await events(model, request, planner())

    assert [type(e) for e in found] == [type(e) for e in expected]
    assert text_of(found) == text_of(expected)
    assert await model.reader.read(texts) == expected_scores
    assert model.description == here.description


async def test_an_answer_is_read_on_there_and_only_what_is_new_is_sent(
    model: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = ask("tell me something").messages
    sent: list[int] = []
    send = Connection.send
    monkeypatch.setattr(
        Connection, "send", lambda self, given: (sent.append(len(pickle.dumps(given))), send(self, given))[1]
    )
    session = model.reader.open(messages)
    answer = "a reply that is much longer than what is new of it, " * 40

    found = [await session.read(None)] + [await session.read(answer[:n]) for n in (1000, 1020, 1900)]
    session.close()

    whole = [ReadRequest(messages=messages)]
    whole += [ReadRequest(messages=messages, response=answer[:n]) for n in (1000, 1020, 1900)]
    for scores, expected in zip(found, await model.reader.read(whole), strict=True):
        assert scores.tokens == expected.tokens
        assert scores.outcomes == pytest.approx(expected.outcomes, abs=1e-4)
    assert sent[2] < 500 < sent[1]  # bytes, of 20 characters and of 1000


async def test_a_session_goes_on_whole_after_its_process_died(own_model: EmbeddedModel) -> None:
    messages = ask("tell me something").messages
    session = own_model.reader.open(messages)
    await session.read("a reply")

    os.kill(pid_of(own_model), signal.SIGKILL)
    await until(lambda: own_model.engine.load.state == "starting")
    with pytest.raises(Unavailable):
        await session.read("a reply and")
    await until(lambda: own_model.engine.load.state == "ready")
    found = await session.read("a reply and more")

    (expected,) = await own_model.reader.read([ReadRequest(messages=messages, response="a reply and more")])
    assert found.outcomes == pytest.approx(expected.outcomes, abs=1e-4)


async def test_the_planner_runs_in_this_process(model: EmbeddedModel) -> None:
    seen: list[Scores] = []

    def plan(scores: Scores) -> Plan:
        seen.append(scores)
        return planner(Action.REFUSE)(scores)

    found = await events(model, ask("hello"), plan)

    assert [type(e) for e in found] == [Planned, Finished]
    assert len(seen) == 1


async def test_a_reply_is_steered_from_this_process(model: EmbeddedModel) -> None:
    request = ask("tell me something", max_tokens=20, logit_bias={256: -100.0})
    turned: list[Event] = []
    steered = model.generator.generate(
        request, planner(weights=Weights(0, 1, 0, 0)), window_tokens=8, steer=lambda *_: Weights(0, 0, 1, 0)
    )

    async for event in steered:
        turned.append(event)

    (at,) = [e for e in turned if isinstance(e, Steered)]
    assert (at.weights, at.completion_tokens) == (Weights(0, 0, 1, 0), 8)
    assert text_of(turned) != text_of(await events(model, request, planner(weights=Weights(0, 1, 0, 0))))


async def test_errors_arrive_as_what_they_are(model: EmbeddedModel) -> None:
    def broken(scores: Scores) -> Plan:
        raise RuntimeError("no plan")

    with pytest.raises(ContextTooLong) as told:
        await events(model, ask("x" * 9000), planner())
    assert told.value.hint
    with pytest.raises(GeneratorError, match="no plan"):
        await events(model, ask("hello"), broken)
    with pytest.raises(ContextTooLong, match="text 1 of 2"):
        await model.reader.read(
            [ReadRequest(messages=ask("a").messages), ReadRequest(messages=ask("x" * 9000).messages)]
        )
    assert (await events(model, ask("hello"), planner()))[-1].reason in ("stop", "length")


async def test_a_killed_process_ends_every_stream_and_the_next_request_is_answered(model: EmbeddedModel) -> None:
    streams = [await open_stream(model, endless(f"number {i}"), planner()) for i in range(3)]
    before = pid_of(model)

    os.kill(before, signal.SIGKILL)
    ended = await asyncio.gather(*(task for _, task in streams), return_exceptions=True)
    killed = time.monotonic()

    assert [type(e) for e in ended] == [Unavailable] * 3
    assert "signal 9" in str(ended[0])
    assert all(e.retry_after_s > 0 for e in ended)  # type: ignore[union-attr,operator]
    with pytest.raises(Unavailable):
        await events(model, ask("too soon"), planner())
    assert model.engine.load.state == "starting"
    await until(lambda: model.engine.load.state == "ready")
    found = await events(model, ask("tell me something"), planner())
    assert isinstance(found[-1], Finished)
    assert pid_of(model) != before
    assert time.monotonic() - killed < 60  # ten seconds on an idle machine: benchmarks/ measures it


async def test_a_request_that_kills_the_process_twice_is_refused_and_those_beside_it_are_not(
    model: EmbeddedModel,
) -> None:
    def deadly(scores: Scores) -> Plan:
        os.kill(pid_of(model), signal.SIGKILL)
        return planner()(scores)

    beside, task = await open_stream(model, endless("innocent"), planner())
    with pytest.raises(Unavailable):
        await events(model, ask("poison"), deadly)
    with pytest.raises(Unavailable):
        await task
    await until(lambda: model.engine.load.state == "ready")
    again, task = await open_stream(model, endless("innocent"), planner())  # both are sent again
    deadly_again = asyncio.create_task(events(model, ask("poison"), deadly))
    await asyncio.sleep(0.3)
    assert not task.done()  # the poison is held back while the other suspect runs
    task.cancel()
    with pytest.raises(Unavailable):
        await deadly_again
    await until(lambda: model.engine.load.state == "ready")

    with pytest.raises(Quarantined):
        await events(model, ask("poison"), deadly)
    assert isinstance((await events(model, ask("innocent"), planner()))[-1], Finished)
    assert beside
    assert again


async def test_a_process_that_gives_no_sign_of_life_is_replaced(
    model: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pid_of(model)
    _, task = await open_stream(model, endless("hello"), planner())
    monkeypatch.setattr(module, "_SILENT_S", 3.0)

    os.kill(before, signal.SIGSTOP)

    with pytest.raises(Unavailable):
        await task
    monkeypatch.undo()
    await until(lambda: model.engine.load.state == "ready")
    assert pid_of(model) != before


async def test_who_leaves_frees_the_row(model: EmbeddedModel) -> None:
    _, task = await open_stream(model, endless("hello"), planner())
    await until(lambda: model.engine.load.rows == 1)

    task.cancel()

    await until(lambda: model.engine.load.rows == 0, seconds=10)


async def test_draining_lets_replies_end_and_takes_nothing_new(own_model: EmbeddedModel) -> None:
    found, task = await open_stream(own_model, ask("hello", max_tokens=60, logit_bias={256: -100.0}), planner())

    draining = asyncio.create_task(own_model.drain(60))
    await asyncio.sleep(0.05)
    with pytest.raises(Unavailable, match="shutting down"):
        await events(own_model, ask("late"), planner())
    await draining
    await task

    assert isinstance(found[-1], Finished)
    assert found[-1].completion_tokens == 60
    assert any(isinstance(e, Window) for e in found)


async def test_what_outlasts_the_drain_ends_with_an_error_and_no_process_stays(own_model: EmbeddedModel) -> None:
    pid = pid_of(own_model)
    _, task = await open_stream(own_model, endless("hello"), planner())

    await own_model.drain(0.05)

    with pytest.raises(Unavailable):
        await task
    assert not Path(f"/proc/{pid}").exists()


async def test_closing_while_it_is_started_again_leaves_no_process(
    own_model: EmbeddedModel,
) -> None:
    engine = own_model.engine
    assert isinstance(engine, Supervisor)
    os.kill(pid_of(own_model), signal.SIGKILL)
    await until(lambda: engine._starting is not None and engine._starting.process.poll() is None)
    second = engine._starting.process.pid  # type: ignore[union-attr]

    await own_model.aclose()

    assert engine.load.state == "draining"
    await until(lambda: not Path(f"/proc/{second}").exists(), 20)


async def test_a_connection_is_closed_once(own_model: EmbeddedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # By whichever thread: a second close meets a descriptor that is gone, or worse, one that is another's by then.
    closed: list[int] = []
    close = Connection.close

    def slowly(connection: Connection) -> None:
        closed.append(connection.fileno())
        time.sleep(0.1)
        close(connection)

    monkeypatch.setattr(Connection, "close", slowly)

    await own_model.aclose()

    await until(lambda: bool(closed))
    await asyncio.sleep(0.3)
    assert len(closed) == 1


async def test_the_process_gets_no_keys(tiny: Bundle, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "UPSTREAM_API_KEY", "WEBHOOK_SECRET", "AUDIT_URL"):
        monkeypatch.setenv(f"HHH_ROUTER_{name}", f"postgresql://canary:canary@{name}/x")
    monkeypatch.setenv("PGPASSWORD", "canary")

    model = await asyncio.to_thread(open_supervised, tiny, settings)
    environment = Path(f"/proc/{pid_of(model)}/environ").read_bytes()
    await model.aclose()

    assert b"canary" not in environment
    assert b"PATH=" in environment


async def test_a_bundle_that_cannot_be_loaded_says_why(tiny: Bundle, settings: Settings, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny.root, tmp_path / "broken")
    (tmp_path / "broken" / "heads.safetensors").write_bytes(b"no heads")

    with pytest.raises(BundleError, match="heads"):
        await asyncio.to_thread(open_supervised, Bundle.load(str(tmp_path / "broken")), settings)


def test_the_process_goes_when_its_parent_is_killed(tiny: Bundle, settings: Settings) -> None:
    code = (
        "import sys, time; from hhh_router.bundle import Bundle; from hhh_router.settings import Settings;"
        "from hhh_router.model.supervisor import open_supervised;"
        f"settings = Settings.load(cache_dir={str(settings.cache_dir)!r}, threads=1);"
        f"m = open_supervised(Bundle.load({str(tiny.root)!r}), settings);"
        "print(m.engine.pid, 'torch' in sys.modules, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, with_torch = parent.stdout.readline().split()
        assert with_torch == "False"
        assert Path(f"/proc/{pid}").exists()

        parent.kill()

    end = time.monotonic() + 20
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():  # empty: a zombie
        assert time.monotonic() < end
        time.sleep(0.05)


async def test_gates_of_rows_in_the_process_are_their_own(model: EmbeddedModel) -> None:
    weightings = [Weights(1, 0, 0, 0), Weights(0, 1, 0, 0), Weights(0, 0, 1, 0)]
    alone = [text_of(await events(model, ask("tell me something"), planner(weights=w))) for w in weightings]

    together = await asyncio.gather(*(events(model, ask("tell me something"), planner(weights=w)) for w in weightings))

    assert [text_of(t) for t in together] == alone
    assert len(set(alone)) == 3
