"""`hhh-router calibrate --from feedback`: calibrators fitted to the stored scores of labelled requests."""

from pathlib import Path

import numpy as np
import pytest

from hhh_router.bundle import Bundle
from hhh_router.calibration import CalibrationFile
from hhh_router.calibration.fit import fit_head
from hhh_router.errors import DataError
from hhh_router.model.inspect import bundle_mistakes
from hhh_router.testing import make_scores
from hhh_router.trace.feedback import Label, Labelled
from hhh_router.training.from_feedback import feedback_rows, refit_from_feedback
from tests.unit.test_feedback_store import seen

pytestmark = pytest.mark.integration


def labelled(i: int, bundle: Bundle, logit: float, harmful: bool, **more: object) -> Labelled:
    assert bundle.manifest.heads is not None
    fields = {"heads_sha256": bundle.manifest.heads.sha256, "dtype": "float32", **more}
    drawn = fields.pop("drawn", True)
    request = seen(f"r{i}", prompt=make_scores({"needs.harmless": logit}), **fields)
    label = Label(request_id=f"r{i}", labels={"harmful": harmful}, probability=0.5 if drawn else None)
    return Labelled(request=request, said=(label,))


def drawn_rows(bundle: Bundle, n: int = 200) -> list[Labelled]:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, n)
    y = rng.random(n) < 1 / (1 + np.exp(-logits / 3))
    return [labelled(i, bundle, float(x), bool(v)) for i, (x, v) in enumerate(zip(logits, y, strict=True))]


def test_the_calibrator_is_the_one_that_the_stored_logits_fit(tiny: Bundle, tmp_path: Path) -> None:
    rows = drawn_rows(tiny)

    refit_from_feedback(tiny, feedback_rows(rows, tiny), tmp_path / "mine", seed=3)

    made = Bundle.load(tmp_path / "mine")
    file = CalibrationFile.read(made.root / "calibrators.json")
    logits = [r.request.prompt.needs["harmless"] for r in rows if r.request.prompt]
    expected = fit_head(logits, [int(r.said[0].labels["harmful"]) for r in rows], seed=3)
    assert file.modes["prompt"].needs["harmless"] == expected
    assert file.modes["prompt"].n == 200
    assert file.dtype == "float32"
    assert bundle_mistakes(made) == []


def test_rows_that_say_nothing_of_these_calibrators_are_left_out_and_counted(tiny: Bundle) -> None:
    rows = drawn_rows(tiny, 40)
    rows += [labelled(100, tiny, 1.0, True, heads_sha256="00" * 32), labelled(101, tiny, 1.0, True, dtype="bfloat16")]
    rows += [labelled(102, tiny, 1.0, True, drawn=False)]
    verdict = Label(request_id="r103", labels={"passed_wrongly": False}, probability=1.0)
    rows += [Labelled(request=rows[0].request, said=(verdict,))]

    found = feedback_rows(rows, tiny)

    assert found.used == 40
    assert sorted(found.left_out.values()) == [1, 1, 1, 1]
    assert feedback_rows(rows, tiny, reported=True).used == 41
    assert found.sha256 == feedback_rows(rows[::-1], tiny).sha256


def test_without_a_row_it_says_why(tiny: Bundle) -> None:
    with pytest.raises(DataError, match="1 not drawn at random"):
        feedback_rows([labelled(1, tiny, 1.0, True, drawn=False)], tiny)
    with pytest.raises(DataError, match="nothing is labelled"):
        feedback_rows([], tiny)
