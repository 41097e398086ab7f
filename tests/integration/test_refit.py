"""`hhh-router calibrate --bundle … --data MY.jsonl`: a finished bundle fitted to somebody's own rows."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hhh_router.bundle import Bundle
from hhh_router.calibration import CalibrationFile
from hhh_router.cli.main import app
from hhh_router.data.examples import Example, ask
from hhh_router.errors import BundleError, DataError
from hhh_router.interfaces.sdk import HHHRouter
from hhh_router.model.inspect import bundle_mistakes
from hhh_router.settings import Settings
from hhh_router.training.refit import refit

pytestmark = pytest.mark.integration


def row(i: int, **more: object) -> Example:
    return Example(
        source="own", split="eval", messages=ask(f"request {i}"), needs={"harmless": float(i % 3 == 0)}, **more
    )  # type: ignore[arg-type]


def test_labelled_heads_are_fitted_and_the_others_kept(tiny: Bundle, tmp_path: Path) -> None:
    rows = [row(i, response="yes", outcomes={"unsafe": float(i % 4 == 0)}) for i in range(80)]
    target = tmp_path / "mine"

    changes = refit(tiny, rows, target, settings=Settings.load(threads=1), seed=1)

    assert {(c.mode, c.head): c.kept for c in changes} == {
        ("prompt", "harmless"): "", ("both", "harmless"): "", ("both", "unsafe"): "",
    }  # fmt: skip
    assert all(c.n == 80 for c in changes)
    assert all(c.nll_after < c.nll_before for c in changes)  # random heads: the base rate beats them
    before, after = (CalibrationFile.read(b.root / "calibrators.json") for b in (tiny, Bundle.load(target)))
    assert after.modes["prompt"].needs["harmless"] != before.modes["prompt"].needs["harmless"]
    assert after.modes["prompt"].needs["honest"] == before.modes["prompt"].needs["honest"]
    assert after.modes["response"] == before.modes["response"]


def test_the_new_bundle_verifies_and_serves(tiny: Bundle, tmp_path: Path) -> None:
    refit(tiny, [row(i) for i in range(60)], tmp_path / "mine", settings=Settings.load(threads=1), seed=1)

    assert bundle_mistakes(Bundle.load(tmp_path / "mine")) == []
    with HHHRouter(bundle=tmp_path / "mine", threads=1) as router:
        assert router.route("hello").metadata.bundle.name == "mine"


def test_a_head_with_one_class_keeps_its_calibrator_and_says_why(tiny: Bundle, tmp_path: Path) -> None:
    rows = [row(i, response="no", outcomes={"untruthful": 0.0}) for i in range(60)]

    changes = refit(tiny, rows, tmp_path / "mine", settings=Settings.load(threads=1), seed=1)

    (kept,) = [c for c in changes if c.head == "untruthful"]
    assert "0 of 60" in kept.kept
    assert kept.nll_after == kept.nll_before


def test_too_few_labels_stop_with_what_to_do_and_leave_nothing(tiny: Bundle, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no head has enough labels"):
        refit(tiny, [row(i) for i in range(10)], tmp_path / "mine", settings=Settings.load(threads=1), seed=1)

    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tiny: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="already there"):
        refit(tiny, [row(i) for i in range(60)], tmp_path, settings=Settings.load(threads=1), seed=1)


def test_the_command_lists_broken_rows_and_goes_on_only_when_told(tiny: Bundle, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"request {i}", "labels": {"harmful": i % 3 == 0}}) for i in range(60)]
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join([*lines, "{oops"]) + "\n")
    options = ["calibrate", "--bundle", str(tiny.root), "--data", str(data), "--out", str(tmp_path / "mine")]

    stopped = CliRunner().invoke(app, options)
    done = CliRunner().invoke(app, [*options, "--skip-broken"])

    assert stopped.exit_code != 0
    assert done.exit_code == 0, done.output
    assert "mine.jsonl:61" in done.output
    assert "harmless" in done.output
    assert (tmp_path / "mine/manifest.json").is_file()
