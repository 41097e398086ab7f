"""calibrators.json: what is checked when it is loaded, and what it makes of scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hhh_router.calibration import (
    CalibrationFile,
    Calibrators,
    ConfidenceModel,
    FeatureWeight,
    HeadCalibration,
    ModeCalibration,
)
from hhh_router.calibration.evidence import GateCalibration, GateCandidate
from hhh_router.errors import BundleError, ReaderError
from hhh_router.routing import posterior
from hhh_router.routing.gate import GATE_PARAMETERS
from hhh_router.types import DIMENSIONS, EXPERTS, OUTCOMES, Posterior, Scores, Weights

HEADS = "ab" * 32
WEIGHTS = Weights(0.25, 0.25, 0.25, 0.25)


def head(temperature: float = 2.0) -> HeadCalibration:
    return HeadCalibration(
        method="temperature",
        params={"temperature": temperature},
        n=400,
        positives=100,
        nll=0.3,
        brier=0.09,
        ece=0.021,
        nll_identity=0.4,
        brier_identity=0.1,
        ece_identity=0.08,
        auroc=0.93,
    )


def mode(*, needs: bool = True, confidence: ConfidenceModel | None = None) -> ModeCalibration:
    return ModeCalibration(
        n=500,
        distance_limit=1.3,
        needs={d: head() for d in DIMENSIONS} if needs else {},
        outcomes={o: head(4.0) for o in OUTCOMES},
        confidence=confidence,
    )


def model() -> ConfidenceModel:
    return ConfidenceModel(
        bias=1.0,
        terms={
            "min_margin": FeatureWeight(mean=1.0, scale=0.5, weight=0.8),
            "log_tokens": FeatureWeight(mean=0.0, scale=1.0, weight=-0.1),
        },
        penalty=0.01,
        n=400,
        right=350,
        nll=0.3,
        brier=0.1,
        ece=0.02,
        auroc=0.8,
    )


def calibration_file(**modes: ModeCalibration) -> CalibrationFile:
    return CalibrationFile.create(
        heads_sha256=HEADS,
        dtype="bfloat16",
        data_sha256="cd" * 32,
        seed=7,
        train_prior=Posterior(0.4, 0.3, 0.2, 0.1),
        modes=modes or {"prompt": mode(), "both": mode(), "response": mode(needs=False)},  # type: ignore[arg-type]
    )


PRIOR = Posterior(0.1, 0.2, 0.3, 0.4)


def gate(name: str = "softmax_ts", **params: float) -> GateCalibration:
    return GateCalibration(
        name=name,
        params=params or {"temperature": 2.5},
        n=300,
        cross_entropy=1.2,
        candidates={"odds": GateCandidate(cross_entropy=1.3, standard_error=0.02, gap=0.1, gap_error=0.01)},
        data_sha256="ef" * 32,
        seed=3,
    )


def gated_file(prior: Posterior = PRIOR) -> CalibrationFile:
    plain = calibration_file()
    return CalibrationFile.create(
        heads_sha256=plain.heads_sha256, dtype=plain.dtype, data_sha256=plain.data_sha256, seed=plain.seed,
        train_prior=prior, modes=plain.modes, gate=gate(),
    )  # fmt: skip


def scores(which: str = "prompt", *, distance: float = 1.0, **changed: float) -> Scores:
    return Scores(
        mode=which,  # type: ignore[arg-type]
        needs={d: changed.get(d, 1.0) for d in DIMENSIONS},
        outcomes={o: changed.get(o, -2.0) for o in OUTCOMES},
        distance=distance,
        tokens=20,
    )


@pytest.fixture
def written(tmp_path: Path) -> Callable[[CalibrationFile], Path]:
    def write(file: CalibrationFile) -> Path:
        file.write(tmp_path / "calibrators.json")
        return tmp_path / "calibrators.json"

    return write


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_a_written_file_loads_with_the_same_id_and_content(written):
    file = calibration_file(prompt=mode(confidence=model()))

    path = written(file)

    assert CalibrationFile.read(path) == file
    assert Calibrators.load(path, heads_sha256=HEADS, dtype="bfloat16").id == file.id


def test_the_id_names_the_content_and_nothing_else(written):
    assert calibration_file().id == calibration_file().id
    assert calibration_file().id != calibration_file(prompt=mode()).id
    assert len(calibration_file().id) == len("cal-") + 12


def test_needs_and_outcomes_come_out_calibrated():
    evidence = Calibrators(calibration_file()).evidence(scores(harmless=3.0, unsafe=2.0))

    assert evidence.needs["harmless"] == pytest.approx(1 / (1 + math.exp(-3 / 2)))
    assert evidence.outcomes["unsafe"] == pytest.approx(1 / (1 + math.exp(-2 / 4)))
    assert evidence.posterior == posterior(evidence.needs, "odds")
    assert evidence.calibrated
    assert evidence.scores.needs["harmless"] == 3.0


@pytest.mark.parametrize(("distance", "inside"), [(1.3, True), (1.3001, False)])
def test_a_reading_beyond_the_modes_distance_limit_is_out_of_distribution(distance, inside):
    assert Calibrators(calibration_file()).evidence(scores(distance=distance)).in_distribution is inside


def test_each_mode_uses_its_own_calibrators():
    both = ModeCalibration(
        n=9, distance_limit=1.0, needs={d: head(0.5) for d in DIMENSIONS}, outcomes={o: head() for o in OUTCOMES}
    )
    calibrators = Calibrators(calibration_file(prompt=mode(), both=both))

    assert calibrators.evidence(scores("prompt")).needs["honest"] == pytest.approx(1 / (1 + math.exp(-1 / 2)))
    assert calibrators.evidence(scores("both")).needs["honest"] == pytest.approx(1 / (1 + math.exp(-1 / 0.5)))


def test_a_mode_nobody_calibrated_is_labelled_so():
    evidence = Calibrators(calibration_file(prompt=mode())).evidence(scores("both", helpful=1.0))

    assert not evidence.calibrated
    assert evidence.needs["helpful"] == pytest.approx(1 / (1 + math.exp(-1)))


def test_a_response_alone_reports_no_needs_and_the_training_prior():
    evidence = Calibrators(calibration_file()).evidence(scores("response"))

    assert evidence.needs == {}
    assert evidence.posterior == Posterior(0.4, 0.3, 0.2, 0.1)
    assert set(evidence.outcomes) == set(OUTCOMES)
    assert evidence.calibrated


def test_a_head_without_a_calibrator_is_left_out_not_passed_off_as_calibrated():
    read = Scores(
        mode="prompt",
        needs={**dict.fromkeys(DIMENSIONS, 0.0), "injection": 9.0},
        outcomes=dict.fromkeys(OUTCOMES, 0.0),
        distance=1.0,
        tokens=3,
    )

    assert "injection" not in Calibrators(calibration_file()).evidence(read).needs


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["harmless", "unsafe", "distance"])
def test_a_reading_that_is_not_finite_is_an_error_never_evidence(where, value):
    for calibrators in (Calibrators(calibration_file()), Calibrators.none()):
        with pytest.raises(ReaderError, match=rf"{where} = {value}"):
            calibrators.evidence(scores(**{where: value}))


def test_scores_without_a_calibrated_head_are_an_error():
    read = Scores(mode="prompt", needs={}, outcomes=dict.fromkeys(OUTCOMES, 0.0), distance=1.0, tokens=3)

    with pytest.raises(ReaderError, match="no need head 'helpful'"):
        Calibrators(calibration_file()).evidence(read)


def test_without_calibrators_every_number_says_so():
    calibrators = Calibrators.none()
    evidence = calibrators.evidence(scores(harmless=2.0))
    reference = calibrators.reference(evidence)
    confidence = calibrators.confidence(evidence, weights=WEIGHTS, policy_shift_nats=0.1, limits=[(0.9, 0.5)])

    assert not evidence.calibrated
    assert evidence.needs["harmless"] == pytest.approx(1 / (1 + math.exp(-2)))
    assert (reference.id, reference.method, reference.n, reference.ece) == ("none", "none", 0, None)
    assert not reference.calibrated
    assert not confidence.calibrated


@pytest.mark.parametrize(("distance", "inside"), [(1.9, True), (2.1, False)])
def test_without_calibrators_a_nominal_limit_stands_for_their_support(distance, inside):
    assert Calibrators.none().evidence(scores(distance=distance)).in_distribution is inside


def test_other_heads_or_precision_refuse_to_start_and_say_both(written):
    path = written(calibration_file())

    with pytest.raises(BundleError) as error:
        Calibrators.load(path, heads_sha256="ef" * 32, dtype="float32")

    assert "fitted for abababababab…, the bundle's heads are efefefefefef…" in error.value.message
    assert "fitted for bfloat16, the backbone runs in float32" in error.value.message
    assert str(path) in error.value.message
    assert "ALLOW_UNCALIBRATED" in str(error.value)


def test_another_precision_may_start_labelled_uncalibrated(written):
    calibrators = Calibrators.load(
        written(calibration_file(prompt=mode(confidence=model()))),
        heads_sha256=HEADS,
        dtype="float32",
        allow_uncalibrated=True,
    )
    evidence = calibrators.evidence(scores(harmless=3.0))
    confidence = calibrators.confidence(evidence, weights=WEIGHTS, policy_shift_nats=0.0, limits=[])

    assert evidence.needs["harmless"] == pytest.approx(1 / (1 + math.exp(-3 / 2)))
    assert not evidence.calibrated
    assert not confidence.calibrated
    assert calibrators.reference(evidence).ece is None


def test_other_heads_may_start_with_plain_logistic_numbers(written):
    calibrators = Calibrators.load(
        written(calibration_file()), heads_sha256="ef" * 32, dtype="bfloat16", allow_uncalibrated=True
    )
    evidence = calibrators.evidence(scores(harmless=3.0))

    assert evidence.needs["harmless"] == pytest.approx(1 / (1 + math.exp(-3)))
    assert not evidence.calibrated
    assert calibrators.id == "none"


def test_a_fitted_gate_is_written_read_and_applied(written):
    file = gated_file()

    calibrators = Calibrators.load(written(file), heads_sha256=HEADS, dtype="bfloat16")
    evidence = calibrators.evidence(scores(harmless=3.0))

    raised = {"base": 1.0} | {d: math.exp((1.5 if d == "harmless" else 0.5) / 2.5) for d in DIMENSIONS}
    expected = {e: x / sum(raised.values()) for e, x in raised.items()}
    assert CalibrationFile.read(written(file)) == file
    assert evidence.posterior.as_dict() == pytest.approx(expected)
    assert calibrators.gate == "softmax_ts"
    assert calibrators.evidence(scores("response")).posterior == PRIOR


def test_another_gate_changes_the_id():
    assert gated_file().id == gated_file().content_id() != calibration_file().id


def test_a_prior_that_leaves_no_share_to_an_expert_makes_no_gate():
    with pytest.raises(ValidationError, match="share of base must be > 0"):
        gated_file(Posterior(0.0, 0.5, 0.3, 0.2))


def test_a_file_that_names_no_gate_or_odds_is_served_with_odds(written):
    """As files were written before gates had parameters: the same bytes make the same id."""
    named = calibration_file().model_dump(mode="json")
    silent = {k: v for k, v in named.items() if k != "gate"}

    assert named["gate"] == "odds"
    assert CalibrationFile.model_validate(silent) == calibration_file()
    assert Calibrators(calibration_file()).gate == Calibrators.none().gate == "odds"


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"params": {"temperature": -1.0}}, r"gate\.fitted: Value error, gate 'softmax_ts': temperature must be > 0"),
        ({"params": {"temperature": 1e-320}}, r"gate\.fitted: Value error, the gate's parameters make logits that"),
        ({"params": {}}, r"gate\.fitted: Value error, gate 'softmax_ts' needs temperature"),
        ({"params": {"temperature": 1.0, "bias": 1.0}}, r"has no parameter 'bias'"),
        ({"params": {"temperature": "warm"}}, r"gate\.fitted\.params\.temperature: Input should be a valid number"),
        ({"name": "arrow"}, r"gate\.fitted: Value error, gate 'arrow' is not known"),
        ({"n": 0}, r"gate\.fitted\.n: Input should be greater than or equal to 1"),
        ({"surprise": 1}, r"gate\.fitted\.surprise: Extra inputs"),
    ],
)
def test_a_gate_with_mistakes_is_refused_by_name(written, wrong, complaint):
    def spoil(content):
        content["gate"] |= wrong

    file = gated_file()

    with pytest.raises(BundleError, match=complaint):
        CalibrationFile.read(changed(written(file), spoil))


def test_a_gate_that_needs_parameters_cannot_be_named_alone(written):
    with pytest.raises(BundleError, match=r"gate\.name: Input should be 'odds'"):
        CalibrationFile.read(changed(written(calibration_file()), lambda content: content.update(gate="softmax_ts")))


def test_a_gate_is_checked_where_needs_are_certain_too():
    """Each entry is finite by itself, but not what they make of a need of 1."""
    huge = dict.fromkeys(GATE_PARAMETERS["dirichlet"], 0.0) | {f"{e}.base": 1e308 for e in EXPERTS}

    with pytest.raises(ValidationError, match="not finite"):
        gate("dirichlet", **huge)


def test_a_missing_file_names_its_path(tmp_path):
    with pytest.raises(BundleError, match=r"calibrators\.json: cannot be read \(No such file") as error:
        Calibrators.load(tmp_path / "calibrators.json", heads_sha256=HEADS, dtype="bfloat16", allow_uncalibrated=True)

    assert "hhh-router calibrate" in str(error.value)


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "calibrators.json").write_text('{"format": 1, "id": ')

    with pytest.raises(BundleError, match=r"calibrators\.json: file: Invalid JSON"):
        Calibrators.load(tmp_path / "calibrators.json", heads_sha256=HEADS, dtype="bfloat16")


def test_every_wrong_field_is_named_at_once(written):
    def spoil(content):
        content["modes"]["prompt"]["needs"]["honest"]["params"] = {"temperature": -1.0}
        content["surprise"] = 1
        del content["seed"]

    with pytest.raises(BundleError) as error:
        CalibrationFile.read(changed(written(calibration_file()), spoil))

    assert "modes.prompt.needs.honest: Value error, temperature must be > 0, found -1.0" in error.value.message
    assert "surprise: Extra inputs" in error.value.message
    assert "seed: Field required" in error.value.message


def test_a_parameter_changed_by_hand_is_noticed(written):
    def soften(content):
        content["modes"]["prompt"]["needs"]["harmless"]["params"]["temperature"] = 3.0

    with pytest.raises(BundleError, match="it was changed after fitting"):
        CalibrationFile.read(changed(written(calibration_file()), soften))


@pytest.mark.parametrize(
    ("which", "part", "name", "complaint"),
    [
        ("prompt", "needs", "honest", r"modes\.prompt\.needs: no calibrator for honest"),
        ("both", "needs", "helpful", r"modes\.both\.needs: no calibrator for helpful"),
        ("response", "outcomes", "unsafe", r"modes\.response\.outcomes: no calibrator for unsafe"),
    ],
)
def test_a_mode_lacking_a_head_that_policies_ask_for_cannot_be_made(which, part, name, complaint):
    complete = mode()
    heads = {k: v for k, v in getattr(complete, part).items() if k != name}

    with pytest.raises(ValidationError, match=complaint):
        calibration_file(**{which: complete.model_copy(update={part: heads})})


def test_a_prior_without_every_expert_cannot_be_made():
    with pytest.raises(ValidationError, match="share of base must be > 0"):
        CalibrationFile.create(
            heads_sha256=HEADS,
            dtype="bfloat16",
            data_sha256="",
            seed=1,
            train_prior=Posterior(0.0, 0.5, 0.3, 0.2),
            modes={"prompt": mode()},
        )


def test_the_reference_names_calibrator_rows_and_error_of_the_mode():
    calibrators = Calibrators(calibration_file())
    reference = calibrators.reference(calibrators.evidence(scores(distance=9.0)))

    assert (reference.id, reference.method, reference.n, reference.ece) == (calibrators.id, "temperature", 500, 0.021)
    assert reference.calibrated
    assert not reference.in_distribution


def test_a_fitted_confidence_is_the_logistic_of_its_contributions():
    calibrators = Calibrators(calibration_file(prompt=mode(confidence=model())))
    evidence = calibrators.evidence(scores())
    confidence = calibrators.confidence(evidence, weights=WEIGHTS, policy_shift_nats=0.0, limits=[(0.9, 0.5)])
    margin = math.log(0.9 / 0.1)

    assert confidence.contributions["min_margin"] == pytest.approx(0.8 * (margin - 1.0) / 0.5)
    assert confidence.contributions["log_tokens"] == pytest.approx(-0.1 * math.log(21))
    assert confidence.value == pytest.approx(1 / (1 + math.exp(-sum(confidence.contributions.values()))))
    assert confidence.calibrated
