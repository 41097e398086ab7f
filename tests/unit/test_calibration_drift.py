"""What is said of drift without labels, beside independent computations."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import wasserstein_distance

from hhh_router.assemble import load_calibrators
from hhh_router.bundle import Bundle
from hhh_router.calibration import CalibrationFile, HeadCalibration
from hhh_router.calibration.drift import LEAST_READINGS, Drift, histograms, stability_index
from hhh_router.calibration.fit import fit_head
from hhh_router.calibration.kept import KeptRow, read_kept
from hhh_router.settings import Settings
from hhh_router.testing import make_scores
from hhh_router.types import Mode

SHIPPED = Path(__file__).resolve().parents[2] / "adapters" / "smollm2-135m" / "calibrators.json"


def fitted(rows: int = 4000) -> tuple[HeadCalibration, np.ndarray]:
    random = np.random.default_rng(5)
    logits = random.normal(-1.0, 2.0, rows)
    labels = (random.random(rows) < expit(logits)).astype(int)
    return fit_head(logits, labels, seed=3), logits


def probabilities(head: HeadCalibration, logits: np.ndarray) -> np.ndarray:
    return np.array([head.apply(float(x)) for x in logits])


def test_a_fitted_head_holds_the_histogram_of_its_rows() -> None:
    head, logits = fitted()

    counted, _ = np.histogram(probabilities(head, logits), bins=10, range=(0, 1))
    assert list(head.bins or ()) == counted.tolist()


def test_traffic_like_the_calibration_rows_has_not_drifted() -> None:
    head, _ = fitted()
    drift = Drift(head)
    for p in probabilities(head, np.random.default_rng(6).normal(-1.0, 2.0, 1000)):
        drift.add(float(p))

    assert abs(drift.shift) < 0.03
    assert 0 <= drift.index < 0.05


def test_other_traffic_has_drifted_by_no_more_than_wassersteins_distance() -> None:
    head, logits = fitted()
    other = probabilities(head, np.random.default_rng(6).normal(1.5, 1.0, 1000))
    drift = Drift(head)
    for p in other:
        drift.add(float(p))

    before = probabilities(head, logits)
    assert drift.index > 0.25
    assert drift.shift > 0.2
    assert drift.shift == pytest.approx(other.mean() - head.positives / head.n)
    assert drift.shift <= wasserstein_distance(other, before) + abs(before.mean() - head.base_rate)


def test_the_index_is_what_numpy_makes_of_it() -> None:
    expected, found = [5, 0, 45, 50], [0, 30, 20, 10]

    p = (np.array(expected) + 0.5) / (sum(expected) + 2)
    q = (np.array(found) + 0.5) / (sum(found) + 2)
    assert stability_index(expected, found) == pytest.approx(float(((q - p) * np.log(q / p)).sum()))


def test_only_the_latest_count_and_few_say_nothing() -> None:
    head, _ = fitted()
    drift = Drift(head, window=LEAST_READINGS)
    for _ in range(LEAST_READINGS - 1):
        drift.add(0.9)
    few = drift.shift, drift.index
    for _ in range(LEAST_READINGS):
        drift.add(0.2)

    assert all(map(math.isnan, few))
    assert drift.shift == pytest.approx(0.2 - head.base_rate)


def test_a_file_without_bins_keeps_its_id() -> None:
    file = CalibrationFile.read(SHIPPED)

    assert file.id == file.content_id()
    head = file.modes["prompt"].needs["harmless"]
    assert (head.bins is None) == ("bins" not in head.model_dump())
    assert math.isnan(Drift(head.model_copy(update={"bins": None})).index)


def test_calibrators_without_histograms_get_those_of_the_rows_that_the_bundle_keeps() -> None:
    calibrators = load_calibrators(Bundle.load(SHIPPED.parent), Settings())
    told = calibrators.references()
    bare = CalibrationFile.read(SHIPPED).modes

    kept = read_kept(SHIPPED.parent, heads_sha256=calibrators.heads_sha256 or "")
    logits = [r.scores.needs["harmless"] for r in kept.rows if r.scores.mode == "prompt" and "harmless" in r.needs]
    head = told["prompt", "needs.harmless"]
    counted, _ = np.histogram(probabilities(head, np.array(logits)), bins=10, range=(0, 1))
    assert bare["prompt"].needs["harmless"].bins is None
    assert list(head.bins or ()) == counted.tolist()
    assert told["both", "needs.harmless"].bins == head.bins
    drift = Drift(head)
    for x in np.random.default_rng(3).choice(logits, 1000):
        drift.add(head.apply(float(x)))
    assert drift.index < 0.1


def test_a_histogram_of_other_rows_than_a_head_was_fitted_to_is_none() -> None:
    head, logits = fitted()
    rows = [
        KeptRow(source="s", needs={"harmless": 1.0}, scores=make_scores({"needs.harmless": float(x)})) for x in logits
    ]
    places: dict[tuple[Mode, str], HeadCalibration] = {
        ("prompt", "needs.harmless"): head.model_copy(update={"bins": None})
    }

    assert histograms(places, rows) == {("prompt", "needs.harmless"): head.bins}
    assert histograms(places, rows[1:]) == {}
    assert histograms({("prompt", "needs.harmless"): head}, rows) == {}
