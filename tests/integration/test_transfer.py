"""Leaving a source out of training: what is left out, what is asked about, and going on after a kill."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hhh_router.bundle import Bundle, file_sha256
from hhh_router.calibration import metrics
from hhh_router.data.examples import Example, ask, prompt_hash
from hhh_router.errors import DataError
from hhh_router.evaluation import measure as m
from hhh_router.evaluation import transfer as t
from hhh_router.settings import Settings
from hhh_router.training.build import HEADS, Workshop, calibration_examples, router_examples, train_router
from hhh_router.training.calibrate import calibrate
from hhh_router.training.recipe import load_recipe

from .datasets import RECIPE, write_sets

pytestmark = pytest.mark.integration

GROUPS = {"deepset": ("deepset_prompt_injections",), "made": ("made",)}
# a second source of injections: without it a head would have labels of one class when the first is left out
MORE_INJECTIONS = """\
    - {{{{set: deepset_prompt_injections, split: {split}}}}}
    - {{{{set: written/injection, rows: 100, split: {split}}}}}
"""
SMALL: dict[str, Any] = {"seed": 7, "bootstraps": 20, "epochs": 2, "least": 30}


@pytest.fixture(scope="session")
def trained(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A bundle trained on the project's own sets; its experts, which transfer never runs, are the tiny bundle's."""
    import shutil

    folder = tmp_path_factory.mktemp("transfer")
    backbone = tiny.root / "backbone"
    path = folder / "tiny.yaml"
    text = RECIPE.replace("    - {{set: deepset_prompt_injections}}\n", MORE_INJECTIONS.format(split="train")).replace(
        "    - {{set: deepset_prompt_injections, split: calibrate}}\n", MORE_INJECTIONS.format(split="calibrate")
    )
    path.write_text(text.format(backbone=backbone, sha256=file_sha256(backbone / "model.safetensors")))
    recipe, sha256 = load_recipe(path)
    shop = Workshop(
        recipe=recipe, recipe_file=path.name, recipe_sha256=sha256, data=write_sets(folder / "sets"),
        bundle=folder / "bundle", work=folder / "runs" / recipe.name, cache_dir=folder / "cache", threads=1,
    )  # fmt: skip
    shutil.copytree(tiny.root / "experts", shop.bundle / "experts")
    train_router(shop)
    calibrate(shop)
    return shop


@pytest.fixture(scope="module")
def bench(trained: Workshop) -> m.Bench:
    return m.open_bench(
        trained.bundle, trained.data, settings=Settings.load(threads=1), seed=7, work=trained.work.parent,
        recipe=trained.work.parent.parent / "tiny.yaml",
    )  # fmt: skip


@pytest.fixture
def shop(trained: Workshop, tmp_path: Path) -> Workshop:
    """The same with a work folder of its own, beside which token states are read anew."""
    return replace(trained, work=tmp_path / "tiny")


@pytest.fixture(scope="module")
def measure(bench: m.Bench) -> Callable[..., list[dict[str, Any]]]:
    reader, encoder = bench.detector.reader, bench.detector.encoder
    return lambda shop, **more: t.transfer_figures(shop, reader, encoder, **{**SMALL, "groups": GROUPS, **more})


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The sources of every training, as they begin."""
    begun: list[set[str]] = []
    real = t.train_heads

    def noted(examples: list[Example], *rest: Any, **more: Any) -> Iterator[Any]:
        begun.append({e.source for e in examples})
        yield from real(examples, *rest, **more)

    monkeypatch.setattr(t, "train_heads", noted)
    return begun


@pytest.fixture(scope="module")
def rows(
    trained: Workshop, measure: Callable[..., list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The figures of both groups."""
    return measure(replace(trained, work=tmp_path_factory.mktemp("figures") / "tiny"))


def test_each_group_is_left_out_of_a_training_of_its_own(
    shop: Workshop, measure: Callable[..., list[dict[str, Any]]], trainings: list[set[str]]
) -> None:
    rows = measure(shop, epochs=1)

    sources = {e.source for e in router_examples(shop)}
    assert trainings == [sources, sources - {"deepset_prompt_injections"}, sources - {"made"}]
    assert [r["epochs"] for r in rows] == [1] * len(rows)


def test_every_row_has_figures_with_and_without_the_group(rows: list[dict[str, Any]]) -> None:
    assert {(r["group"], r["head"]) for r in rows} >= {("deepset", "injection"), ("made", "honest")}
    for row in rows:
        assert row["split"] == "calibrate"
        assert (row["seed"], row["epochs"], len(row["data_sha256"])) == (7, 2, 64)
        for key in ("auroc", "auroc_in_domain", "auroc_lost", "ece_in_domain"):
            low, high = row[f"{key}_interval"]
            assert low <= high
        assert row["auroc_lost"] == pytest.approx(row["auroc_in_domain"] - row["auroc"])


def test_rows_asked_about_are_the_groups_own_calibrate_rows(shop: Workshop, rows: list[dict[str, Any]]) -> None:
    found = {(r["group"], r["head"]): r for r in rows}

    injection = found["deepset", "injection"]
    own = {prompt_hash(e): e for e in calibration_examples(shop) if e.source == "deepset_prompt_injections"}
    assert injection["n"] == len(own)
    assert injection["positives"] == sum(e.needs["injection"] for e in own.values())
    assert injection["against"] == "own rows"
    assert injection["left_out"] == sum(e.source == "deepset_prompt_injections" for e in router_examples(shop))


def test_a_group_of_one_class_is_ranked_against_the_other_sources(
    rows: list[dict[str, Any]],
) -> None:
    found = {(r["group"], r["head"]): r for r in rows}

    harmless = found["made", "harmless"]  # the project's own questions are all harmless
    assert harmless["positives"] == 0
    assert harmless["against"] == "other sources"
    assert 0 <= harmless["auroc"] <= 1


def test_a_need_that_no_other_source_can_calibrate_has_ranks_and_no_calibration_error(
    rows: list[dict[str, Any]],
) -> None:
    found = {(r["group"], r["head"]): r for r in rows}

    honest = found["made", "honest"]  # nobody else's calibrate rows need honesty
    assert honest["auroc"] is not None
    assert honest["ece"] is None
    assert found["made", "harmless"]["ece"] is not None


def test_figures_are_kept_per_group_and_not_measured_twice(
    shop: Workshop, measure: Callable[..., list[dict[str, Any]]], trainings: list[set[str]]
) -> None:
    first = measure(shop, epochs=1)
    (folder,) = (shop.work / "transfer").iterdir()
    kept = sorted(folder.glob("*.json"))
    for_first = len(trainings)
    kept[-1].unlink()  # as if killed before the last group
    after_kill = measure(shop, epochs=1)
    again = measure(shop, epochs=1)
    other_seed = measure(shop, epochs=1, seed=8)

    assert len(kept) == 2
    assert after_kill == again == json.loads(json.dumps(first))
    assert for_first == 3
    # after the kill the heads with everything come from their checkpoint, and one group is trained; then nothing is;
    # with another seed everything is
    assert len(trainings) == 3 + 2 + 3
    assert [r["seed"] for r in other_seed] == [8] * len(other_seed)


def test_a_killed_training_goes_on_from_its_checkpoint_to_the_same_figures(
    shop: Workshop, measure: Callable[..., list[dict[str, Any]]], rows: list[dict[str, Any]]
) -> None:
    told: list[str] = []

    def killed(stage: str, done: int, total: int, note: str) -> None:
        told.append(note)
        if stage == "transfer" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(replace(shop, on_progress=killed))

    assert measure(shop) == rows
    assert any(note.startswith("without deepset: epoch 1") for note in told)


def test_a_group_without_which_a_head_cannot_be_trained_is_reported_as_such(
    shop: Workshop, measure: Callable[..., list[dict[str, Any]]]
) -> None:
    rows = measure(shop, groups={"injections": ("deepset_prompt_injections", "written/injection"), "made": ("made",)})

    injection = next(r for r in rows if (r["group"], r["head"]) == ("injections", "injection"))
    assert "injection" in injection["error"]
    assert injection["n"] > 0
    assert "auroc" not in injection
    assert all("error" not in r for r in rows if r["group"] == "made")


def test_progress_counts_every_epoch(shop: Workshop, measure: Callable[..., list[dict[str, Any]]]) -> None:
    told: list[tuple[int, int]] = []

    measure(
        replace(shop, on_progress=lambda s, done, total, _: told.append((done, total)) if s == "transfer" else None)
    )

    assert told[0] == (1, 6)  # with everything and without each of two groups, two epochs each
    assert told[-1] == (6, 6)
    assert [d for d, _ in told] == sorted(d for d, _ in told)


def test_an_unknown_source_is_named(shop: Workshop, measure: Callable[..., list[dict[str, Any]]]) -> None:
    with pytest.raises(DataError, match="'nowhere'"):
        measure(shop, groups={"x": ("nowhere",)})


def test_only_the_groups_that_are_named_are_left_out(
    shop: Workshop, measure: Callable[..., list[dict[str, Any]]], rows: list[dict[str, Any]]
) -> None:
    found = measure(shop, only=["made"])

    assert {r["group"] for r in found} == {"made"}
    assert found == [r for r in rows if r["group"] == "made"]


def test_a_group_that_cannot_be_left_out_is_named(shop: Workshop, measure: Callable[..., list[dict[str, Any]]]) -> None:
    with pytest.raises(DataError, match="no group 'mad'") as caught:
        measure(shop, only=["mad"])

    assert "made" in (caught.value.hint or "")


def test_a_recipe_that_reads_other_layers_is_refused(
    shop: Workshop, measure: Callable[..., list[dict[str, Any]]]
) -> None:
    router = shop.recipe.router.model_copy(update={"read_layers": (1,)})

    with pytest.raises(DataError, match="reads layers"):
        measure(replace(shop, recipe=shop.recipe.model_copy(update={"router": router})))


def test_the_suite_writes_figures_card_and_report(bench: m.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = t.transfer_figures
    monkeypatch.setattr(m, "transfer_figures", lambda *a, **k: real(*a, **{**k, **SMALL, "groups": GROUPS}))

    m.measure(bench, ["transfer"], "hhh-router evaluate --suite transfer --recipe tiny.yaml")

    root = bench.bundle.root
    rows = json.loads((root / "figures.json").read_text())["transfer"]
    assert {r["command"] for r in rows} == {"hhh-router evaluate --suite transfer --recipe tiny.yaml"}
    assert "## Leave one source out" in (root / "CARD.md").read_text()
    assert "Leave one source out" in (root / "report.html").read_text()
    assert (root / HEADS).is_file()
    assert Bundle.load(root).verify() is None  # transfer leaves the bundle's own heads alone


def example(source: str, needs: dict[str, float], number: int = 0, **more: Any) -> Example:
    return Example(source=source, split="train", messages=ask(f"{source} {number}"), needs=needs, **more)


def test_groups_are_named_by_prefix_and_need_enough_rows_of_one_need() -> None:
    rows = [example("red_instruct", {"harmless": 1.0}, i) for i in range(15)]
    rows += [example("red_instruct/catqa", {"harmless": 1.0}, i) for i in range(10)]
    rows += [example("written/harm", {"harmless": 1.0}, i) for i in range(20)]
    rows += [example("written/honest", {"honest": 1.0}, i) for i in range(20)]
    rows += [example("two_needs", {"honest": 1.0} if i % 2 else {"helpful": 1.0}, i) for i in range(30)]
    rows += [example("replies", {}, i) for i in range(50)]

    found = t.default_groups(rows, least=20)

    assert found == {
        "red_instruct": ("red_instruct", "red_instruct/catqa"),
        "written/harm": ("written/harm",),
        "written/honest": ("written/honest",),
    }


def test_a_group_without_calibrate_rows_is_asked_about_its_eval_rows_but_none_that_was_trained_on(
    tmp_path: Path,
) -> None:
    folder = write_sets(tmp_path)
    rows = {prompt_hash(e): e for e in t.read_set(folder, "openai_moderation", "eval")}
    trained_on = {prompt_hash(e) for e in t.read_set(folder, "openai_moderation", "calibrate")}
    trained_on.add(next(iter(rows)))

    group = t.held_out("m", ["openai_moderation"], [], trained_on, folder)
    nothing = t.held_out("d", ["dolly"], [], set(), folder)

    assert group is not None
    assert (group.split, group.calibrated) == ("eval", False)
    assert {prompt_hash(e) for e in group.rows} == set(rows) - trained_on
    assert nothing is None


def test_another_part_of_a_data_set_is_asked_about_where_one_is_left_out(tmp_path: Path) -> None:
    folder = write_sets(tmp_path)
    rows = [{"category": "x", "subcategory": "y", "prompt": f"Question {i}?", "split": "eval"} for i in range(9)]
    path = folder / "red_instruct/catqa_english.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    group = t.held_out("red_instruct", ["red_instruct"], [], set(), folder)

    assert group is not None
    assert {e.source for e in group.rows} == {"red_instruct/catqa"}
    assert len(group.rows) == 9


def test_in_domain_probabilities_come_from_calibrators_that_never_saw_the_row() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, 400)
    y = (rng.random(400) < 1 / (1 + np.exp(-3 * x))).astype(float)
    flipped = y.copy()
    flipped[0] = 1 - y[0]

    one = t._in_domain(x, y, x, y, 1, crossed=False)
    crossed = t._in_domain(x, y, x, y, 1, crossed=True)

    assert metrics.ece(crossed, y) < 0.08
    assert np.abs(one - crossed).max() < 0.05  # the folds' calibrators differ, and little
    assert not np.array_equal(one, crossed)
