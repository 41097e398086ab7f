"""The gate before quantised weights: measured by a command, kept beside the bundle, asked for at every start."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hhh_router.bundle import MANIFEST, Bundle
from hhh_router.cli.main import app
from hhh_router.errors import BundleError, SettingsError
from hhh_router.model.inspect import bundle_mistakes
from hhh_router.model.quantisation import (
    QUANTISATION,
    Divergence,
    Drift,
    QuantisationFile,
    Record,
    Refusals,
    keep_record,
    measured_parts,
    require_record,
)
from hhh_router.model.worker import load_embedded
from hhh_router.settings import Settings

from .datasets import write_harmless_prompts, write_sets

pytestmark = pytest.mark.integration


def record(bundle: Bundle, **changes: Any) -> Record:
    drift = {"mode": "both", "outcome": "unsafe", "n": 30, "positives": 10, "ece_before": 0.05, "mean_shift": 0.001}
    given: dict[str, Any] = {
        "scheme": "int8",
        "dtype": "float32",
        "parts": measured_parts(bundle),
        "seed": 1,
        "data_sha256": "0" * 64,
        "max_tokens": 8,
        "torch": "2.13.0",
        "divergence": Divergence(mean_nats=changes.pop("nats", 0.004), n=100, replies=5),
        "readings": (Drift(**drift, ece_after=changes.pop("ece", 0.052)),),
        "refusals": Refusals(n=40, before=0.05, after=changes.pop("refused", 0.05)),
        "passes": True,
    }
    return Record(**(given | changes))


@pytest.fixture
def bundle(copy_of_tiny: Path) -> Bundle:
    return Bundle.load(copy_of_tiny)


def start(bundle: Bundle, cache: Path, **settings: Any) -> dict[str, Any]:
    """Open the bundle with int8 weights; how it describes itself."""
    model = load_embedded(bundle, Settings.load(cache_dir=cache, threads=1, quantise="int8", **settings))
    model.engine.close()
    return model.description


def rewrite(bundle: Bundle, change: Callable[[dict[str, Any]], None]) -> Bundle:
    content = json.loads((bundle.root / MANIFEST).read_text())
    change(content)
    (bundle.root / MANIFEST).write_text(json.dumps(content))
    return Bundle.load(bundle.root)


def test_without_a_record_it_does_not_start_and_names_the_command(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="int8 weights change in float32 has not been measured") as caught:
        start(bundle, tmp_path)

    assert "hhh-router bundle quantise --scheme int8" in (caught.value.hint or "")


def test_with_a_record_that_passes_it_starts_and_says_what_the_copies_take(bundle: Bundle, tmp_path: Path) -> None:
    keep_record(bundle, record(bundle))

    found = start(bundle, tmp_path)

    assert found["quantise"] == "int8"
    assert found["quantised_bytes"] > 4 * 7 * 32 * 32


def test_a_record_for_another_precision_does_not_do(bundle: Bundle, tmp_path: Path) -> None:
    keep_record(bundle, record(bundle, dtype="bfloat16"))

    with pytest.raises(BundleError, match="in float32 has not been measured"):
        start(bundle, tmp_path)


@pytest.mark.parametrize("part", ["heads", "calibrators", "backbone", "experts"])
def test_a_record_of_other_parts_does_not_do(bundle: Bundle, part: str) -> None:
    keep_record(bundle, record(bundle))

    def change(manifest: dict[str, Any]) -> None:
        if part == "experts":
            manifest["experts"]["helpful"]["blocks"] = [1.0, 0.5]
        else:
            manifest[part]["sha256"] = "f" * 64

    with pytest.raises(BundleError, match=f"measured with other {part} than") as caught:
        require_record(rewrite(bundle, change), "int8", "float32")

    assert "hhh-router bundle quantise" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"nats": 0.0201}, "next token moves by 0.0201"),
        ({"ece": 0.0601}, "ECE of unsafe, mode both"),
        ({"refused": 0.075}, "refused grow from 0.050 to 0.075"),
    ],
)
def test_a_broken_bound_is_not_served_and_cannot_be_called_a_pass(
    bundle: Bundle, tmp_path: Path, broken: dict[str, float], said: str
) -> None:
    keep_record(bundle, record(bundle, passes=False, **broken))

    with pytest.raises(BundleError, match=said):
        start(bundle, tmp_path)
    with pytest.raises(ValueError, match="it was changed after measuring"):
        record(bundle, **broken)


def test_better_numbers_are_no_drift(bundle: Bundle) -> None:
    assert record(bundle, ece=0.0, refused=0.0).broken() == []


def test_a_new_record_replaces_the_one_of_its_precision_and_those_of_other_parts(bundle: Bundle) -> None:
    keep_record(bundle, record(bundle, dtype="bfloat16", parts={"heads": "other"}))
    keep_record(bundle, record(bundle, nats=0.001))
    keep_record(bundle, record(bundle, dtype="bfloat16"))
    path = keep_record(bundle, record(bundle, nats=0.002))

    kept = {r.dtype: r.divergence.mean_nats for r in QuantisationFile.read(path).records}
    assert kept == {"bfloat16": 0.004, "float32": 0.002}


def test_verify_takes_a_record_and_names_a_broken_one(bundle: Bundle) -> None:
    path = keep_record(bundle, record(bundle))
    assert bundle_mistakes(bundle) == []
    assert Bundle.load(bundle.root).sha256 == bundle.sha256

    content = json.loads(path.read_text())
    content["records"][0]["divergence"]["mean_nats"] = 0.5
    path.write_text(json.dumps(content))

    (mistake,) = bundle_mistakes(bundle)
    assert f"{QUANTISATION}: records.0: " in mistake
    assert "it was changed after measuring" in mistake


@pytest.mark.parametrize("settings", [{"device": "cuda:0"}, {"dtype": "float16"}])
def test_another_device_or_precision_is_refused_before_anything_is_loaded(
    bundle: Bundle, tmp_path: Path, settings: dict[str, str]
) -> None:
    keep_record(bundle, record(bundle))

    with pytest.raises(SettingsError, match="HHH_ROUTER_QUANTISE=int8"):
        start(bundle, tmp_path, **settings)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of small data sets, with one of harmless prompts."""
    root = write_sets(tmp_path_factory.mktemp("sets"), rows=24)
    write_harmless_prompts(root)
    return root


def quantise(bundle: Bundle, data: Path, *options: str) -> Any:
    given = ["bundle", "quantise", "--bundle", str(bundle.root), "--data", str(data), "--replies", "6", "--items", "24"]
    return CliRunner().invoke(app, [*given, "--max-tokens", "6", *options], env={"HHH_ROUTER_THREADS": "1"})


def test_the_command_measures_and_then_the_bundle_starts(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    result = quantise(bundle, data, "--json")

    (kept,) = QuantisationFile.read(bundle.root / QUANTISATION).records
    # random weights: a reading may move by more than it may, but the figures are all there
    assert result.exit_code == (0 if kept.passes else 1), result.output
    assert (kept.scheme, kept.dtype, kept.seed) == ("int8", "float32", 17)
    assert kept.parts == measured_parts(bundle)
    assert kept.refusals.n == 6
    assert kept.divergence.replies == 8
    assert 0 < kept.divergence.mean_nats < 0.02
    assert {(r.mode, r.outcome) for r in kept.readings} >= {("both", "unsafe"), ("response", "untruthful")}
    assert all(0 < r.mean_shift < 0.05 for r in kept.readings)
    if kept.passes:
        assert start(bundle, tmp_path)["quantise"] == "int8"


def test_a_broken_bound_ends_with_exit_code_1_and_is_written_down(
    bundle: Bundle, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hhh_router.model.quantisation.MOST_NATS", 1e-12)

    result = quantise(bundle, data)

    assert result.exit_code == 1
    assert "the next token moves by" in result.stderr
    assert not QuantisationFile.read(bundle.root / QUANTISATION).records[0].passes


def test_unknown_schemes_and_folders_without_replies_are_refused(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    scheme, empty = quantise(bundle, data, "--scheme", "int4"), quantise(bundle, tmp_path)

    assert scheme.exit_code == empty.exit_code == 2
    assert "--scheme int4: not known" in scheme.stderr
    assert "jailjudge_mini" in empty.stderr
    assert not (bundle.root / QUANTISATION).exists()
