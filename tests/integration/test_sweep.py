"""Optimisers and rates compared by short runs, and the command that does it."""

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from hhh_router.bundle import Bundle
from hhh_router.errors import DataError
from hhh_router.training.build import Workshop
from hhh_router.training.recipe import BlocksRecipe, Share
from hhh_router.training.sweep import sweep, write_runs

from .test_training import data, make_shop, shop  # noqa: F401  # fixtures

pytestmark = pytest.mark.integration
PAIRS = Share(set="red_instruct", rows=8, reply="refusal", against="backbone")
BENIGN = Share(set="dolly", rows=6, reply="backbone")


def judged(made: Workshop) -> Workshop:
    blocks = BlocksRecipe(benign=(BENIGN,), pairs={"harmless": (PAIRS,)})
    plan = made.recipe.experts.model_copy(update={"blocks": blocks, "own_reply_tokens": 8})
    return replace(made, recipe=made.recipe.model_copy(update={"experts": plan}))


def test_every_run_sees_the_same_lessons_and_is_judged(shop: Workshop) -> None:  # noqa: F811
    runs = list(sweep(judged(shop), "harmless", optimizers=["adamw", "muon"], rates=[0.0001, 0.01], steps=3))

    assert [(r.optimizer, r.learning_rate) for r in runs] == [
        ("adamw", 0.0001), ("adamw", 0.01), ("muon", 0.0001), ("muon", 0.01),
    ]  # fmt: skip
    for slow, fast in (runs[:2], runs[2:]):
        assert slow.loss is not None
        assert slow.drift < fast.drift  # type: ignore[operator]
        assert slow.trial is not None
        assert slow.trial.reward == pytest.approx(0.5, abs=0.02)  # it has hardly left the backbone
        assert slow.trial.blocks == (1.0,)
    assert not shop.bundle.exists()


def test_the_same_sweep_gives_the_same_figures(shop: Workshop) -> None:  # noqa: F811
    first, again = (
        list(sweep(judged(shop), "harmless", optimizers=["adamw"], rates=[0.01], steps=2)) for _ in range(2)
    )

    assert first == again  # the second found the first one's checkpoint and had no step left to make
    assert first[0].loss > 0  # type: ignore[operator]


def test_a_run_that_diverges_is_told_and_the_others_go_on(shop: Workshop, tmp_path: Path) -> None:  # noqa: F811
    runs = list(sweep(judged(shop), "harmless", optimizers=["adamw"], rates=[1e30, 0.01], steps=3))

    assert (runs[0].loss, runs[0].trial) == (None, None)
    assert runs[1].trial is not None
    write_runs(tmp_path / "runs.tsv", runs)
    lines = (tmp_path / "runs.tsv").read_text().splitlines()
    assert lines[1].split("\t") == ["adamw", "1e+30", *["diverged"] * 5]
    assert lines[2].startswith("adamw\t0.01\t")


def test_what_cannot_be_compared_says_why(shop: Workshop) -> None:  # noqa: F811
    with pytest.raises(DataError, match=r"experts\.blocks\.pairs\.honest"):
        list(sweep(judged(shop), "honest", optimizers=["adamw"], rates=[0.01], steps=1))
    with pytest.raises(DataError, match="need 8000 lessons"):
        list(sweep(judged(shop), "harmless", optimizers=["adamw"], rates=[0.01], steps=1000))


def test_an_unknown_optimiser_is_refused(tiny: Bundle, data: Path, tmp_path: Path) -> None:  # noqa: F811
    make_shop(tiny, data, tmp_path)

    result = CliRunner().invoke(
        app, ["train", "sweep", "-r", str(tmp_path / "tiny.yaml"), "--data", str(data), "--optimizer", "sgd"]
    )

    assert result.exit_code == 2
    assert "sgd" in result.output
