"""Which figures are told to have left their bounds, and which are not."""

import asyncio
import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hhh_router.calibration import Calibrators
from hhh_router.calibration.drift import Drift, Support
from hhh_router.calibration.metrics import ece
from hhh_router.calibration.monitor import Bound, Figure, calibration_figures, error_figures, reading_figures
from hhh_router.evaluation.flips import find_flips
from hhh_router.interfaces.server.feedback import Monitor
from hhh_router.interfaces.server.metrics import Metrics
from hhh_router.pipeline.watch import bound_text, bounds_of, stored_figures
from hhh_router.policy import load_policy
from hhh_router.testing import FakeReader, fake_pipeline, make_scores
from hhh_router.trace.feedback import Label, Labelled, make_label
from hhh_router.trace.feedback_store import FeedbackStore
from hhh_router.types import GuardRequest, Message, ReadRequest
from tests.unit.test_calibration_evidence import calibration_file, head
from tests.unit.test_feedback_store import seen

FILE = calibration_file()
CALIBRATORS = Calibrators(FILE)
BOUND = Bound(policy="p@1", sha256="ab" * 32, benign_refused=0.05, harm_passed=0.2, level=0.95)


def labelled(i: int, *, stopped: bool, harmful: bool, probability: float | None = 1.0) -> Labelled:
    label = Label(request_id=f"r{i}", labels={"harmful": harmful}, probability=probability)
    return Labelled(request=seen(f"r{i}", stopped=stopped), said=(label,))


def named(figures: list[Figure], name: str) -> Figure:
    [found] = [f for f in figures if f.name == name]
    return found


def test_an_error_past_its_budget_is_told_and_the_other_side_kept() -> None:
    rows = [labelled(i, stopped=i % 5 == 0, harmful=False) for i in range(150)]
    rows += [labelled(i, stopped=i % 20 != 0, harmful=True) for i in range(200, 400)]

    figures = error_figures(rows, [BOUND])

    refused, passed = named(figures, "benign_refused"), named(figures, "harm_passed")
    assert (refused.n, refused.value, refused.state) == (150, 0.2, "outside")
    assert refused.low is not None
    assert refused.low > 0.05
    assert (passed.n, passed.value, passed.state) == (200, pytest.approx(0.05), "inside")


def test_few_labels_leave_the_question_open() -> None:
    rows = [labelled(i, stopped=i == 0, harmful=False) for i in range(10)]

    figure = named(error_figures(rows, [BOUND]), "benign_refused")
    assert figure.state == "open"
    assert named(error_figures([], [BOUND]), "benign_refused").value is None


def test_complaints_are_counted_and_prove_nothing_about_others() -> None:
    rows = [labelled(i, stopped=True, harmful=False, probability=None) for i in range(100)]

    figure = named(error_figures(rows, [BOUND]), "benign_refused")

    assert (figure.n, figure.also, figure.state, figure.value) == (0, 100, "open", None)


def test_a_lopsided_draw_is_weighted() -> None:
    rows = [labelled(i, stopped=True, harmful=False, probability=0.5) for i in range(40)]
    rows += [labelled(i, stopped=False, harmful=False, probability=0.01) for i in range(100, 130)]

    figure = named(error_figures(rows, [BOUND]), "benign_refused")

    assert figure.value == pytest.approx(40 * 2 / (40 * 2 + 30 * 100))
    assert figure.state != "outside"


def test_a_policy_that_is_no_longer_loaded_has_figures_without_a_bound() -> None:
    figures = error_figures([labelled(1, stopped=True, harmful=False)], [])

    assert {f.state for f in figures} == {"unbounded"}
    assert figures[0].of == "p@1 (abababab)"


def test_bounds_are_those_of_the_budgets(watchful: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "b.yaml"
    path.write_text(watchful().read_text() + "budget: {benign_refused: 0.02, harm_passed: 0.3, level: 0.9}\n")

    [bound] = bounds_of([load_policy(path)])

    assert (bound.benign_refused, bound.harm_passed, bound.level) == (0.02, 0.3, 0.9)
    assert bound.sha256 == load_policy(path).hash


def scored(i: int, logit: float, harmful: bool, calibration_id: str) -> Labelled:
    request = seen(f"r{i}", prompt=make_scores({"needs.harmless": logit}), calibration_id=calibration_id)
    return Labelled(request=request, said=(Label(request_id=f"r{i}", labels={"harmful": harmful}, probability=1.0),))


@pytest.mark.parametrize(("truth", "state"), [(2.0, "open"), (8.0, "outside")])
def test_calibration_is_judged_on_labels_and_its_error_is_that_of_the_metrics(truth: float, state: str) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 6, 500)  # the head's calibrator divides by 2
    y = rng.random(500) < 1 / (1 + np.exp(-logits / truth))
    rows = [scored(i, float(x), bool(v), FILE.id) for i, (x, v) in enumerate(zip(logits, y, strict=True))]
    rows += [scored(1000, 0.0, True, "cal-of-before")]

    figures = calibration_figures(rows, FILE.id, CALIBRATORS.references(), CALIBRATORS.evidence)

    [found] = [f for f in figures if f.of == "needs.harmless in prompt"]
    p = [CALIBRATORS.evidence(make_scores({"needs.harmless": float(x)})).needs["harmless"] for x in logits]
    assert found.n == 500
    assert found.value == pytest.approx(ece(p, y.astype(int)))
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.value + 0.05
    assert found.state == state


def test_traffic_like_the_calibration_rows_is_inside_and_other_traffic_is_not() -> None:
    rng = np.random.default_rng(0)
    like, moved = Drift(head()), Drift(head())
    for _ in range(3000):
        like.add(float(rng.random() < 0.25))
        moved.add(0.6 + 0.2 * rng.random())
    inside, outside = Support(), Support()
    for i in range(1000):
        inside.add(i % 100 != 0)
        outside.add(i % 5 != 0)

    figures = reading_figures({("prompt", "like"): like, ("both", "moved"): moved}, {"prompt": inside, "both": outside})

    assert {f.of: f.state for f in figures} == {
        "prompt": "inside", "both": "outside", "like in prompt": "inside", "moved in both": "outside",
    }  # fmt: skip


def test_a_store_is_judged_as_a_server_is(watchful: Callable[..., Path]) -> None:
    requests = [seen(f"r{i}", prompt=make_scores({"needs.harmless": 9.0}), calibration_id=FILE.id) for i in range(300)]
    requests += [seen("other", calibration_id="cal-x")]

    found = {(f.name, f.of): f for f in stored_figures(requests, CALIBRATORS)}

    figure = found["mean_probability", "needs.harmless in prompt"]
    assert (figure.n, figure.state) == (300, "outside")
    assert bound_text(figure) == "0.15 … 0.35"


def test_flips_are_counted_and_rates_compared(watchful: Callable[..., Path]) -> None:
    policy = load_policy(watchful())  # refuses at .9
    other = calibration_file(
        prompt=FILE.modes["prompt"].model_copy(update={"needs": {**FILE.modes["prompt"].needs, "harmless": head(20.0)}})
    )
    rows = []
    for i, (logit, harmful) in enumerate([(6.0, False), (6.0, True), (60.0, True), (-4.0, False)]):
        request = seen(
            f"r{i}", stopped=logit > 5, prompt=make_scores({"needs.harmless": logit}), heads_sha256=FILE.heads_sha256,
            calibration_id=FILE.id, policy_sha256=policy.hash,
        )  # fmt: skip
        label = Label(request_id=f"r{i}", labels={"harmful": harmful}, probability=1.0)
        rows.append(Labelled(request=request, said=(label,)))

    flips = find_flips([r.request for r in rows], rows, policy, CALIBRATORS, Calibrators(other))

    assert (flips.n, flips.newly_passed, flips.newly_stopped, flips.other_action) == (4, 2, 0, 0)
    assert [name for name, _, _ in flips.requests] == ["r0", "r1"]
    assert flips.benign_refused == (0.5, 0.0)
    assert flips.harm_passed == (0.0, 0.5)
    assert (flips.as_recorded, flips.recorded) == (4, 4)


@pytest.mark.parametrize(
    ("prompt", "reply", "action"),
    [({}, {}, "allow"), ({"needs.harmless": 20.0}, {}, "refuse"), ({}, {"outcomes.unsafe": 20.0}, "block"),
     (None, {"outcomes.unhelpful": 20.0}, "flag"), (None, {}, "allow")],
)  # fmt: skip
async def test_a_stored_request_is_decided_as_it_was(
    watchful: Callable[..., Path], prompt: dict[str, float] | None, reply: dict[str, float], action: str
) -> None:
    reader = FakeReader({"prompt": prompt or {}, "reply": reply})
    pipeline = fake_pipeline(watchful(), reader=reader, calibrators=CALIBRATORS)
    pipeline.remember_in(FeedbackStore())
    turns = () if prompt is None else (Message(role="user", content="prompt"),)
    [verdict] = await pipeline.guard([GuardRequest(read=ReadRequest(messages=turns, response="reply"))])
    await pipeline.feedback(make_label(verdict.metadata.request_id, {"harmful": True}))
    memory = pipeline.parts.memory
    assert memory is not None
    rows = await memory.labelled()
    await pipeline.aclose()

    flips = find_flips([r.request for r in rows], rows, load_policy(watchful()), CALIBRATORS, CALIBRATORS)

    assert rows[0].request.action == action
    assert (flips.n, flips.recorded, flips.as_recorded, flips.requests) == (1, 1, 1, ())


async def test_a_change_is_logged_once_and_shown_and_looking_is_not_repeated_at_once(
    watchful: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = fake_pipeline(watchful(), reader=FakeReader({"bomb": {"needs.harmless": 30.0}}), calibrators=CALIBRATORS)
    pipeline.remember_in(FeedbackStore())
    metrics = Metrics(lambda: pipeline.load, CALIBRATORS.references())
    pipeline.add_sink(metrics)
    now = [0.0]
    monitor = Monitor(pipeline, metrics, clock=lambda: now[0])
    asked = ReadRequest(messages=(Message(role="user", content="bomb"),))

    with caplog.at_level(logging.INFO, logger="hhh_router.interfaces.server.feedback"):
        for _ in range(40):
            [verdict] = await pipeline.guard([GuardRequest(read=asked)])
            await pipeline.feedback(make_label(verdict.metadata.request_id, {"harmful": False}, "", True, 1))
            now[0] += 20
            await monitor.look()
        told = monitor.told(await monitor.look())
        [verdict] = await pipeline.guard([GuardRequest(read=asked)])
        await pipeline.feedback(make_label(verdict.metadata.request_id, {"harmful": True}, "", True, 1))
        assert monitor.told(await monitor.look(again=True)) == told  # less than a second later

    left = [f for f in told["figures"] if f["state"] == "outside"]
    assert "calibration_error" in [f["name"] for f in left]
    assert (told["outside"], told["labelled"]) == (len(left), 40)
    of = "needs.harmless in prompt"
    lines = [r.getMessage() for r in caplog.records if f"calibration_error of {of}" in r.getMessage()]
    assert len(lines) == 1
    page = bytes(metrics.page().body).decode()
    assert f'hhh:drift_outside{{figure="calibration_error",of="{of}"}} 1.0' in page
    assert 'hhh:drift_value{figure="benign_refused",of="watchful@3"} 1.0' in page
    await pipeline.aclose()


async def test_metrics_are_told_where_labels_cannot_be_read_and_the_watch_goes_on(
    watchful: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "f.sqlite3"
    pipeline = fake_pipeline(watchful(), calibrators=CALIBRATORS)
    pipeline.remember_in(FeedbackStore(path))
    metrics = Metrics(lambda: pipeline.load, CALIBRATORS.references())
    now = itertools.count(0, 100)
    monitor = Monitor(pipeline, metrics, clock=lambda: next(now))
    watching = asyncio.create_task(monitor.watch(every_s=0.001))
    while not await monitor.look():
        await asyncio.sleep(0.001)
    for file in tmp_path.iterdir():
        file.unlink()

    while "labels cannot be read" not in caplog.text:
        await asyncio.sleep(0.001)
    assert not watching.done()
    assert await monitor.look()  # the figures of before
    watching.cancel()
    await asyncio.wait([watching])
    await pipeline.aclose()
