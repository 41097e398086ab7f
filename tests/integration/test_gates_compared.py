"""Gates compared on a tiny bundle: the same rows and folds for all, each figure against a computation of its own."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from typer.testing import CliRunner

from hhh_router.bundle import Bundle, file_sha256
from hhh_router.calibration import CalibrationFile
from hhh_router.calibration.arrow import arrow_shares, fit_temperature, prototypes
from hhh_router.calibration.fit import FOLDS, stratified_folds
from hhh_router.calibration.gates import compare_gates
from hhh_router.cli.evaluate import _formulations, _public
from hhh_router.cli.main import app
from hhh_router.data.examples import data_hash
from hhh_router.errors import BundleError, DataError, SettingsError
from hhh_router.evaluation import gates as g
from hhh_router.evaluation import measure as m
from hhh_router.evaluation.steering import Steering
from hhh_router.model.base import load_backbone
from hhh_router.model.runner import Runner
from hhh_router.settings import Settings
from hhh_router.training.build import FORMULATION, HEADS, Workshop, train_router
from hhh_router.training.calibrate import GateRows, calibrate, gate_rows, prompt_needs
from hhh_router.training.recipe import Recipe, load_recipe
from hhh_router.types import DIMENSIONS, ReadRequest

from .datasets import RECIPE, write_sets

pytestmark = pytest.mark.integration

USEFULNESS = """\
  usefulness:
    temperature: 0.2
    max_tokens: 200
    mix:
      - {set: halueval_general, split: calibrate}
      - {set: openai_moderation, split: calibrate, only: harmless, reply: refusal}
"""
OF = {
    "trinityx": "{name: trinityx, temperature: 0.5, importance: {harmless: 3}}",
    "h3fusion": "{name: h3fusion}",
}
OURS = ["odds", "softmax_ts", "dirichlet"]
FIXED = ["uniform", "uniform thirds", "best fixed weighting", "floor"]


def make_shop(recipe: Path, data: Path, folder: Path, told: Callable[..., None] = lambda *_: None) -> Workshop:
    loaded, sha256 = load_recipe(recipe)
    return Workshop(
        recipe=loaded, recipe_file=recipe.name, recipe_sha256=sha256, data=data, bundle=folder,
        work=folder.parent / "runs" / loaded.name, cache_dir=folder.parent / "cache", threads=1, on_progress=told,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets, a recipe, and a recipe for each formulation beside it."""
    folder = tmp_path_factory.mktemp("gates")
    backbone = tiny.root / "backbone"
    text = RECIPE.format(backbone=backbone, sha256=file_sha256(backbone / "model.safetensors"))
    (folder / "tiny.yaml").write_text(text.replace("epochs: 25", "epochs: 6") + USEFULNESS)
    for name, options in OF.items():
        own = f"base: tiny.yaml\nname: tiny-{name}\nrouter: {{formulation: {options}}}\n"
        (folder / f"{name}.yaml").write_text(own)
    write_sets(folder / "sets")
    return folder


@pytest.fixture(scope="module")
def trained(tiny: Bundle, folder: Path) -> Workshop:
    """A calibrated bundle with the tiny bundle's experts."""
    shop = make_shop(folder / "tiny.yaml", folder / "sets", folder / "bundle")
    shutil.copytree(tiny.root / "experts", shop.bundle / "experts")
    train_router(shop)
    calibrate(shop)
    return shop


@pytest.fixture(scope="module")
def formulations(folder: Path, trained: Workshop) -> dict[str, Path]:
    """Heads of both formulations, trained in folders without any expert."""
    for name in OF:
        train_router(make_shop(folder / f"{name}.yaml", folder / "sets", folder / name))
    return {name: folder / name / HEADS for name in OF}


@pytest.fixture(scope="module")
def bench(trained: Workshop, folder: Path, formulations: dict[str, Path]) -> m.Bench:
    return m.open_bench(
        trained.bundle, trained.data, settings=Settings.load(threads=1), seed=7, work=folder / "runs",
        recipe=folder / "tiny.yaml", formulations=formulations,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runner(bench: m.Bench) -> Runner:
    return Steering(bench).runner


@pytest.fixture(scope="module")
def rows(trained: Workshop, runner: Runner) -> GateRows:
    return gate_rows(trained.recipe, trained.data, runner)


@pytest.fixture(scope="module")
def figures(trained: Workshop, bench: m.Bench, runner: Runner) -> list[dict[str, Any]]:
    return g.gate_figures(bench, runner, trained.recipe, formulations=bench.formulations)


@pytest.fixture(scope="module")
def of(figures: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["gate"]: row for row in figures}


@pytest.fixture(scope="module")
def among(rows: GateRows) -> np.ndarray:
    """The targets without base."""
    return rows.targets[:, 1:] / (1 - rows.targets[:, :1])


def test_every_gate_is_judged_on_the_same_rows(figures: list[dict[str, Any]], rows: GateRows) -> None:
    assert [row["gate"] for row in figures] == [*OURS, "arrow", *OF, *FIXED]
    stamps = {(row["n"], row["seed"], row["data_sha256"]) for row in figures}
    assert stamps == {(len(rows.examples), 7, data_hash(rows.examples))}
    assert all(row["nll_experts_error"] > 0 for row in figures if not row["gate"].startswith("uniform thirds"))


def test_our_gates_have_the_figures_of_the_comparison_that_chose_one(
    of: dict[str, dict[str, Any]], rows: GateRows, trained: Workshop, bench: m.Bench
) -> None:
    detector = bench.detector
    needs = prompt_needs(rows.examples, detector.reader, detector.encoder, detector.calibrators, 200)

    fits = compare_gates(needs, rows.targets, 7)

    for fit in fits:
        assert of[fit.name]["nll"] == pytest.approx(fit.cross_entropy)
        assert of[fit.name]["nll_error"] == pytest.approx(fit.standard_error)
    served = CalibrationFile.read(trained.bundle / "calibrators.json").gate
    assert [name for name, row in of.items() if row.get("chosen")] == [served.name]  # type: ignore[union-attr]


def test_without_base_the_odds_gate_shares_by_odds(
    of: dict[str, dict[str, Any]], rows: GateRows, among: np.ndarray, bench: m.Bench
) -> None:
    detector = bench.detector
    q = prompt_needs(rows.examples, detector.reader, detector.encoder, detector.calibrators, 200)

    odds = q / (1 - q)
    loss = -(among * np.log(odds / odds.sum(axis=1, keepdims=True))).sum(axis=1)

    assert of["odds"]["nll_experts"] == pytest.approx(loss.mean())


def test_arrow_reads_what_the_first_adapted_layer_reads(
    of: dict[str, dict[str, Any]], rows: GateRows, among: np.ndarray, trained: Workshop, bench: m.Bench, tiny: Bundle
) -> None:
    model = load_backbone(tiny.root / "backbone", trained.recipe.backbone).stack.model  # bare, and transformers' loop
    layer = model.model.layers[2]
    states = []
    for example in rows.examples:
        text = bench.detector.encoder.encode(ReadRequest(messages=example.messages))
        with torch.no_grad():
            hidden = model(torch.tensor([text.ids]), output_hidden_states=True).hidden_states[2][0]
        rms = hidden / (hidden.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
        states.append((rms * layer.input_layernorm.weight)[slice(*text.prompt_span)].mean(0).double().numpy())
    factors = []
    for d in DIMENSIONS:
        tensors = g.load_expert(trained.bundle / "experts" / d, d).factors["model.layers.2.self_attn.q_proj"]
        factors.append((tensors.down.numpy(), tensors.up.numpy()))

    fold = stratified_folds(rows.targets.argmax(axis=1), folds=FOLDS, seed=7)
    directions, h = prototypes(factors), np.array(states)
    given = np.column_stack([np.zeros(len(h)), among])
    loss = np.empty(len(h))
    for k in range(FOLDS):
        held = fold == k
        temperature = fit_temperature(h[~held], directions, given[~held])
        loss[held] = -(among[held] * np.log(arrow_shares(h[held], directions, temperature)[:, 1:])).sum(axis=1)

    assert of["arrow"]["nll_experts"] == pytest.approx(loss.mean(), rel=1e-4)
    assert of["arrow"]["nll"] is None


def test_a_formulations_shares_are_those_of_its_heads_and_options(
    of: dict[str, dict[str, Any]],
    rows: GateRows,
    among: np.ndarray,
    bench: m.Bench,
    formulations: dict[str, Path],
) -> None:
    reader, encoder = bench.detector.reader, bench.detector.encoder
    for name, path in formulations.items():
        heads = g.Heads.load(path, layers=2, dim=32)
        by_heads = g.HeadReader(reader.stack, heads, (1, 2), 2)
        texts = [encoder.encode(ReadRequest(messages=e.messages)) for e in rows.examples]
        logits = np.array([[by_heads.score([t])[0].needs[d] for d in DIMENSIONS] for t in texts])

        p = softmax(logits / 0.5, axis=1) * [1, 3, 1] if name == "trinityx" else softmax(logits, axis=1)
        loss = -(among * np.log(p / p.sum(axis=1, keepdims=True))).sum(axis=1)

        assert of[name]["nll_experts"] == pytest.approx(loss.mean(), rel=1e-4)
        assert of[name]["nll_experts_error"] == pytest.approx(loss.std(ddof=1) / math.sqrt(len(loss)), rel=1e-4)
        assert of[name]["nll"] is None


def test_what_looks_at_no_request_and_the_floor_are_there_to_compare_with(
    of: dict[str, dict[str, Any]], rows: GateRows, among: np.ndarray
) -> None:
    assert of["uniform"]["nll"] == pytest.approx(math.log(4))
    assert of["uniform"]["nll_experts"] == of["uniform thirds"]["nll_experts"] == pytest.approx(math.log(3))
    assert of["uniform thirds"]["nll"] is None
    assert of["floor"]["nll"] == pytest.approx(-(rows.targets * np.log(rows.targets)).sum(axis=1).mean())
    assert of["floor"]["nll_experts"] == pytest.approx(-(among * np.log(among)).sum(axis=1).mean())
    for row in of.values():
        assert row["nll"] is None or row["nll"] >= of["floor"]["nll"]
        assert row["nll_experts"] >= of["floor"]["nll_experts"]


def test_the_best_fixed_weighting_never_saw_the_rows_it_is_judged_on(
    of: dict[str, dict[str, Any]], rows: GateRows
) -> None:
    t = rows.targets
    fold = stratified_folds(t.argmax(axis=1), folds=FOLDS, seed=7)

    loss = [-(t[i] * np.log(t[fold != fold[i]].mean(axis=0))).sum() for i in range(len(t))]

    assert of["best fixed weighting"]["nll"] == pytest.approx(np.mean(loss))


def test_without_a_module_that_reads_the_layer_arrow_says_why(
    trained: Workshop, bench: m.Bench, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(g, "_MODULES", ("k_proj",))  # the tiny experts adapt no keys

    found = g.gate_figures(bench, runner, trained.recipe, formulations={})

    (arrow,) = [row for row in found if row["gate"] == "arrow"]
    assert arrow["error"] == "layer 2: no k_proj that all experts adapt"
    assert [row["gate"] for row in found] == [*OURS, "arrow", *FIXED]


def test_a_recipe_without_such_rows_cannot_compare(trained: Workshop, bench: m.Bench, runner: Runner) -> None:
    calibration = trained.recipe.calibration.model_copy(update={"usefulness": None})
    recipe: Recipe = trained.recipe.model_copy(update={"calibration": calibration})

    with pytest.raises(DataError, match=r"no calibration\.usefulness"):
        g.gate_figures(bench, runner, recipe, formulations={})


def test_gates_are_measured_when_named_and_reach_card_and_report(
    trained: Workshop, folder: Path, formulations: dict[str, Path], figures: list[dict[str, Any]]
) -> None:
    command = "hhh-router evaluate --suite gates"
    bench = m.open_bench(
        trained.bundle, trained.data, settings=Settings.load(threads=1), seed=7, work=folder / "runs",
        recipe=folder / "tiny.yaml", formulations=formulations,
    )  # fmt: skip

    m.measure(bench, ["gates"], command)

    kept = json.loads((trained.bundle / "figures.json").read_text())["gates"]
    assert kept == [{**row, "command": command, "dtype": "float32"} for row in figures]
    card = (trained.bundle / "CARD.md").read_text()
    (uniform,) = [line for line in card.splitlines() if line.startswith("| uniform |")]
    assert uniform == "| uniform | 1.386 ± 0.000 | 1.099 ± 0.000 |"
    assert "| trinityx | – | " in card
    assert " (served) | " in card
    report = (trained.bundle / "report.html").read_text()
    assert "nll experts" in report
    assert "held-out NLL among the three experts" in report


def test_a_part_that_needs_a_recipe_or_formulations_that_nothing_compares_are_refused(
    folder: Path, formulations: dict[str, Path]
) -> None:
    assert "gates" not in m.DEFAULT_PARTS
    with pytest.raises(DataError, match="'gates' draws a recipe's rows, and no recipe was given"):
        m.check_parts(["gates"])
    with pytest.raises(DataError, match="compared by suite 'gates' alone"):
        m.check_parts(["guard"], folder / "tiny.yaml", formulations)


def test_heads_are_read_only_as_what_they_were_trained(
    folder: Path, formulations: dict[str, Path], tmp_path: Path
) -> None:
    bare, other = tmp_path / "bare", tmp_path / "other"
    for target in (bare, other):
        shutil.copytree(folder / "trinityx", target)
    (bare / FORMULATION).unlink()
    shutil.copy(formulations["h3fusion"], other / HEADS)

    with pytest.raises(DataError, match="heads of h3fusion, given as trinityx"):
        g.check_formulations({"trinityx": formulations["h3fusion"]})
    with pytest.raises(DataError, match="no formulation 'mixtral'"):
        g.check_formulations({"mixtral": formulations["h3fusion"]})
    with pytest.raises(BundleError, match=r"no formulation\.json beside it"):
        g.check_formulations({"trinityx": bare / HEADS})
    with pytest.raises(BundleError, match="describes other heads"):
        g.check_formulations({"trinityx": other / HEADS})


def test_heads_of_another_backbone_are_not_compared(
    trained: Workshop, bench: m.Bench, runner: Runner, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "trinityx", tmp_path / "moved")
    path = tmp_path / "moved" / FORMULATION
    path.write_text(json.dumps(json.loads(path.read_text()) | {"backbone_sha256": "0" * 64}))

    with pytest.raises(DataError, match="heads of another backbone"):
        g.gate_figures(bench, runner, trained.recipe, formulations={"trinityx": tmp_path / "moved" / HEADS})


def test_the_command_trains_a_formulation_without_experts_and_makes_no_bundle(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HHH_ROUTER_THREADS", "1")
    out = tmp_path / "trinityx"
    options = ["--data", str(folder / "sets"), "--out", str(out), "--work", str(tmp_path / "runs/x")]

    done = CliRunner().invoke(app, ["train", "router", "-r", str(folder / "trinityx.yaml"), *options])

    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in out.iterdir()) == [FORMULATION, HEADS]
    told = json.loads((out / FORMULATION).read_text())
    assert told["formulation"]["temperature"] == 0.5
    assert (told["recipe"], told["read_layers"]) == ("trinityx.yaml", [1, 2])


def test_training_says_why_no_experts_are_needed_and_never_replaces_a_bundles_heads(
    trained: Workshop, folder: Path
) -> None:
    notes: list[str] = []
    before = file_sha256(trained.bundle / HEADS)

    train_router(
        make_shop(folder / "trinityx.yaml", folder / "sets", folder / "trinityx", lambda *told: notes.append(told[3]))
    )
    with pytest.raises(BundleError, match="is a bundle, and heads of trinityx are compared, not served"):
        train_router(make_shop(folder / "trinityx.yaml", folder / "sets", trained.bundle))
    with pytest.raises(BundleError, match="no expert helpful, harmless, honest"):
        train_router(make_shop(folder / "tiny.yaml", folder / "sets", folder / "empty"))

    assert "none needed: heads of trinityx are compared, not served" in notes
    assert file_sha256(trained.bundle / HEADS) == before


@pytest.mark.parametrize("given", [["trinityx"], ["=a"], ["trinityx="], ["trinityx=a", "trinityx=b"]])
def test_a_formulation_that_is_no_name_and_file_is_refused(given: list[str]) -> None:
    with pytest.raises(SettingsError, match=r"is no NAME=HEADS_FILE|is given twice"):
        _formulations(given)


def test_a_recorded_command_names_no_folder_of_heads() -> None:
    assert _public(["--formulation=trinityx=/me/h.safetensors"]) == ["--formulation=trinityx=h.safetensors"]
