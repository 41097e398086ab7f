"""`hhh-router evaluate` on a tiny trained bundle and small sets: parts, provenance, the release gate."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hhh_router.bundle import Bundle
from hhh_router.errors import BackendError, DataError
from hhh_router.evaluation import measure as m
from hhh_router.evaluation.release import parts_hash, release_mistakes
from hhh_router.evaluation.tasks import TASKS, Task, task_rows
from hhh_router.settings import Settings
from hhh_router.types import ReadRequest

from .datasets import write_sets, write_steering_sets

pytestmark = pytest.mark.integration

TASK = Task(
    suite="guard", name="prompt harm · moderation", kind="needs", head="harmless", mode="prompt",
    sets=("openai_moderation",), target=0.99,
)  # fmt: skip

XSTEST = Task(suite="guard", name="XSTest", kind="needs", head="harmless", mode="prompt", sets=("xstest",))


class Coin:
    """A baseline that knows nothing, and one question it fails at."""

    name = "coin"
    heads = frozenset({"harmless"})

    def probabilities(self, texts: list[ReadRequest], head: str) -> list[float]:
        return [0.4 + 0.01 * (i % 7) for i in range(len(texts))]


class Absent(Coin):
    name = "absent"

    def probabilities(self, texts: list[ReadRequest], head: str) -> list[float]:
        raise BackendError("not available: no such package")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture
def bench(copy_of_tiny: Path, data: Path, tmp_path: Path) -> m.Bench:
    return m.open_bench(
        copy_of_tiny, data, settings=Settings.load(threads=1), seed=3, work=tmp_path, baselines=(Coin(), Absent())
    )


@pytest.fixture
def one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks of the public sets are not at hand here; the measuring is the same."""
    monkeypatch.setattr(m, "TASKS", (TASK,))
    monkeypatch.setattr(m, "_latency", lambda bench: [])


def test_every_figure_says_where_it_comes_from(bench: m.Bench, one_task: None) -> None:
    m.measure(bench, ["guard"], "hhh-router evaluate --suite guard")
    figures = json.loads((bench.bundle.root / "figures.json").read_text())

    ours, coin, absent = figures["detection"]
    for row in (ours, coin):
        assert row["n"] == 60
        assert row["positives"] == 30
        assert len(row["data_sha256"]) == 64
        assert row["seed"] == 3
        assert row["command"] == "hhh-router evaluate --suite guard"
        low, high = row["auroc_interval"]
        assert low <= row["auroc"] <= high
        assert row["roc"][0] == [0, 0]
        assert row["roc"][-1] == [1, 1]
    assert ours["meets"] is False
    assert absent["error"].startswith("not available")
    card = (bench.bundle.root / "CARD.md").read_text()
    assert "0.99 missed" in card
    assert "not available" in card


def test_parts_add_up_for_the_same_bundle_and_of_another_only_baselines_are_kept(
    bench: m.Bench, one_task: None
) -> None:
    m.measure(bench, ["guard"], "first")
    m.measure(bench, ["injection"], "second")  # no such task here: nothing new, nothing lost
    path = bench.bundle.root / "figures.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"bundle_parts": "of another bundle", "bundle_reader": "of other heads"}))

    m.measure(bench, ["injection"], "third")

    assert [f["command"] for f in kept["detection"]] == ["first"] * 3
    left = json.loads(path.read_text())["detection"]
    assert [f["system"] for f in left] == ["coin", "absent"]  # what was measured on another bundle is gone


def test_figures_of_readings_outlive_a_change_of_experts_and_others_do_not(bench: m.Bench, one_task: None) -> None:
    m.measure(bench, ["guard"], "first")
    path = bench.bundle.root / "figures.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"bundle_parts": "with other experts", "behaviour": [{"system": "old"}]}))

    m.measure(bench, ["injection"], "second")

    found = json.loads(path.read_text())
    assert [f["command"] for f in found["detection"]] == ["first"] * 3
    assert "behaviour" not in found
    assert found["bundle_parts"] == parts_hash(bench.bundle)


def test_a_suite_without_baselines_leaves_those_measured_on_the_same_prompts(bench: m.Bench, one_task: None) -> None:
    m.measure(bench, ["guard"], "first")
    path = bench.bundle.root / "figures.json"
    kept = json.loads(path.read_text())
    kept["detection"].append(kept["detection"][1] | {"system": "stale", "data_sha256": "of other prompts"})
    path.write_text(json.dumps(kept))

    m.measure(replace(bench, baselines=()), ["guard"], "second")

    found = {f["system"]: f["command"] for f in json.loads(path.read_text())["detection"]}
    assert found == {"coin": "first", "absent": "first", bench.detector.name: "second"}


def test_a_run_that_breaks_keeps_what_it_had_measured(
    bench: m.Bench, one_task: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(bench: m.Bench) -> list[dict[str, object]]:
        raise DataError("the data went away")

    monkeypatch.setattr(m, "_evasion", broken)

    with pytest.raises(DataError, match="went away"):
        m.measure(bench, ["evasion", "guard"], "first")

    figures = json.loads((bench.bundle.root / "figures.json").read_text())
    assert len(figures["detection"]) == 3


def test_other_suites_leave_the_latency_table_alone(
    bench: m.Bench, one_task: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []
    monkeypatch.setattr(m, "_latency", lambda bench: timed.append(1) or [])

    m.measure(bench, ["injection", "reply"], "x")
    m.measure(bench, ["guard"], "x")

    assert timed == [1]


def test_calibration_measures_confidence_kinds_and_subgroups(
    bench: m.Bench, one_task: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(m, "BOOTSTRAPS", 20)
    rows = [
        {"prompt": f"{kind} {i}", "type": kind, "label": "unsafe" if kind.startswith("contrast") else "safe",
         "split": "eval"}
        for kind in ("homonyms", "contrast_homonyms")
        for i in range(9)
    ]  # fmt: skip
    path = bench.data / "xstest/xstest_prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(m, "TASKS", (TASK, XSTEST))

    m.measure(bench, ["calibration"], "hhh-router evaluate --suite calibration")

    figures = json.loads((bench.bundle.root / "figures.json").read_text())
    assert list(dict.fromkeys(f["task"] for f in figures["confidence"])) == ["all guard tasks", TASK.name]
    assert {f["n"] for f in figures["confidence"]} == {78, 60}
    assert [f["kind"] for f in figures["kinds"]] == ["homonyms", "mean over pairs"]
    groups = {f["group"] for f in figures["subgroups"]}
    assert {"group: openai_moderation", "length: up to 12 words", "language: English"} <= groups
    assert {f["command"] for part in ("confidence", "kinds", "subgroups") for f in figures[part]} == {
        "hhh-router evaluate --suite calibration"
    }
    card = (bench.bundle.root / "CARD.md").read_text()
    assert "## Confidence in a refusal" in card
    assert "## XSTest by type" in card


def test_transfer_is_measured_only_when_named_and_needs_a_recipe(bench: m.Bench) -> None:
    assert set(m.PARTS) - set(m.DEFAULT_PARTS) == {"gates", "transfer"}
    with pytest.raises(DataError, match="no recipe was given"):
        m.measure(bench, ["transfer"], "x")


def test_behaviour_and_likelihood_compare_every_system_on_the_same_rows(
    copy_of_tiny: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_sets(tmp_path_factory.mktemp("steered"))
    write_steering_sets(data)
    monkeypatch.setattr(m, "TASKS", ())
    steered = m.open_bench(
        copy_of_tiny, data, settings=Settings.load(threads=1), seed=3, work=tmp_path, rows=3, items=4, max_tokens=4
    )

    m.measure(steered, ["hhh", "helpful", "general", "behaviour"], "hhh-router evaluate")
    figures = json.loads((copy_of_tiny / "figures.json").read_text())

    systems = [row["system"] for row in figures["behaviour"]]
    assert systems[0] == "bare backbone"
    assert {"uniform thirds", "router, no policy", "policy balanced", "oracle"} <= set(systems)
    for row in figures["behaviour"]:
        assert (row["harmful_n"], row["safe_n"], row["truthful_n"]) == (3, 6, 4)
        assert row["joint_interval"][0] <= row["joint"] <= row["joint_interval"][1]
    assert figures["behaviour"][0]["joint_gain"] == 0.0
    tasks = {row["task"]: row["n"] for row in figures["likelihood"] if row["system"] == "policy balanced"}
    assert tasks == {
        "HHH alignment, pairwise": 4, "AlpacaEval, GPT-4's answer": 4, "IFEval, replies of 128 tokens": 3, "MMLU": 4,
        "ARC-Challenge": 4, "HellaSwag": 4, "GSM8K, answer": 4,
    }  # fmt: skip
    assert all(row["command"] == "hhh-router evaluate" for row in figures["likelihood"] + figures["behaviour_sets"])
    report = (copy_of_tiny / "report.html").read_text()
    assert "policy balanced" in report
    assert "HellaSwag" in report


def test_figures_of_other_scales_are_figures_of_another_bundle(copy_of_tiny: Path) -> None:
    bundle = Bundle.load(copy_of_tiny)
    spec = bundle.manifest.experts["honest"].model_copy(update={"blocks": (0.5, 1.0)})
    scaled = bundle.manifest.model_copy(update={"experts": {**bundle.manifest.experts, "honest": spec}})

    assert parts_hash(Bundle(bundle.root, scaled, bundle.sha256)) != parts_hash(bundle)


def test_an_unknown_suite_is_named(bench: m.Bench) -> None:
    with pytest.raises(DataError, match="guard, injection"):
        m.measure(bench, ["gaurd"], "x")


def test_a_bundle_without_figures_of_its_own_is_not_released(bench: m.Bench, one_task: None) -> None:
    (unmeasured,) = release_mistakes(bench.bundle)
    m.measure(bench, ["guard"], "x")
    without_evasion = release_mistakes(bench.bundle)
    (bench.bundle.root / "calibrators.json").write_text("{}")
    manifest = json.loads((bench.bundle.root / "manifest.json").read_text())
    manifest["calibrators"]["sha256"] = "0" * 64
    (bench.bundle.root / "manifest.json").write_text(json.dumps(manifest))
    (changed,) = release_mistakes(Bundle.load(bench.bundle.root))

    assert "no figures" in unmeasured
    assert any("evasion, overall" in line for line in without_evasion)
    assert "measured on other" in changed


def test_tasks_ask_once_about_a_prompt_and_space_rows_evenly(data: Path) -> None:
    from dataclasses import replace

    every = task_rows(TASK, data)
    some = task_rows(replace(TASK, rows=20), data)

    assert len({e.prompt for e in every}) == len(every)
    assert some == every[::3]


def test_targets_are_those_of_named_sets_and_eval_rows() -> None:
    assert {t.split for t in TASKS} == {"eval", "calibrate"}
    assert [t.name for t in TASKS if t.split == "calibrate"] == ["reply over-refuses · XSTest completions"]
