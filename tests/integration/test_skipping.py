"""Experts that are not run: where, how far it moves the next token, and what a bundle must have for it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hhh_router.bundle import Bundle
from hhh_router.cli.main import app
from hhh_router.errors import BundleError
from hhh_router.evaluation.skipping import LEVELS, fit_skipping, shares
from hhh_router.model.experts import load_experts
from hhh_router.model.inspect import bundle_mistakes
from hhh_router.model.mixture import FoldedMixture, MixtureLinear, Skip, install_mixture
from hhh_router.model.quantisation import measured_parts
from hhh_router.model.serving import install_serving
from hhh_router.model.skipping import SKIPPING, SkipRecord, keep_skipping, require_skipping
from hhh_router.model.worker import load_embedded
from hhh_router.settings import Settings
from hhh_router.types import Weights

from .datasets import write_harmless_prompts, write_sets
from .test_serving_layers import load, logits, plain

pytestmark = pytest.mark.integration
LITTLE = Weights(0.55, 0.05, 0.1, 0.3)


def skipping(bundle: Bundle, *thresholds: float) -> Skip:
    return Skip(thresholds, bundle.manifest.first_adapted_layer, bundle.manifest.backbone.layers)


def record(bundle: Bundle, **changes: Any) -> SkipRecord:
    given: dict[str, Any] = {
        "thresholds": (0.2,), "parts": measured_parts(bundle), "budget_nats": 0.01, "mean_nats": 0.004,
        "skipped": 0.3, "idle": 0.1, "n": 100, "replies": 5, "seed": 1, "data_sha256": "0" * 64, "dtype": "float32",
    }  # fmt: skip
    return SkipRecord(**(given | changes))


@pytest.fixture
def bundle(copy_of_tiny: Path) -> Bundle:
    return Bundle.load(copy_of_tiny)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_sets(tmp_path_factory.mktemp("sets"), rows=24)
    write_harmless_prompts(root)
    return root


@pytest.mark.parametrize("serving", [False, True])
def test_an_expert_below_the_threshold_acts_as_if_it_had_no_weight(tiny: Bundle, serving: bool) -> None:
    backbone, skip = load(tiny), skipping(tiny, 0.2)
    experts = load_experts(tiny)
    if serving:
        gates, _ = install_serving(backbone.stack.model, experts, "none", skip)
    else:
        gates = install_mixture(backbone.stack.model, experts, skip)

    found = logits((backbone, gates), [LITTLE, LITTLE])

    expected = logits(plain(tiny), [Weights(0.7, 0.0, 0.0, 0.3)] * 2)  # nobody else gets the share
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits(plain(tiny), [LITTLE, LITTLE]), atol=1e-4)


def test_a_block_that_no_row_needs_runs_no_adapter_and_the_others_do(tiny: Bundle) -> None:
    backbone = load(tiny)
    assert tiny.manifest.backbone.layers - tiny.manifest.first_adapted_layer >= 2
    gates, _ = install_serving(backbone.stack.model, load_experts(tiny), "none", skipping(tiny, 0.9, 0.1))
    ran: dict[int, int] = {}
    for module in backbone.stack.model.modules():
        if isinstance(module, FoldedMixture):
            module.up.register_forward_pre_hook(
                lambda *_, block=module._block: ran.update({block: ran.get(block, 0) + 1})
            )

    logits((backbone, gates), [LITTLE, Weights(0.4, 0.1, 0.1, 0.4)])

    assert set(ran) == {1}


def test_a_base_only_batch_multiplies_with_no_adapter(tiny: Bundle) -> None:
    backbone, gates = plain(tiny)
    called: list[int] = []
    for module in backbone.stack.model.modules():
        if isinstance(module, MixtureLinear):
            gated = module.shared.gated
            module.shared.gated = lambda x, place, of=gated: called.append(place) or of(x, place)  # type: ignore[method-assign]

    logits((backbone, gates), [Weights(1, 0, 0, 0)] * 2)
    assert not called
    logits((backbone, gates), [LITTLE] * 2)
    assert called


def test_without_a_record_it_does_not_start_and_names_the_command(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has not been measured") as caught:
        load_embedded(bundle, Settings.load(cache_dir=tmp_path, threads=1, skip_experts=True))

    assert "hhh-router bundle skip" in (caught.value.hint or "")


def test_with_a_record_it_starts_and_says_so(bundle: Bundle, tmp_path: Path) -> None:
    keep_skipping(bundle, record(bundle))

    model = load_embedded(bundle, Settings.load(cache_dir=tmp_path, threads=1, skip_experts=True))
    model.engine.close()

    assert model.description["skip_below"] == [0.2]


def test_a_record_of_other_parts_does_not_do(bundle: Bundle) -> None:
    keep_skipping(bundle, record(bundle, parts=measured_parts(bundle) | {"experts": "f" * 64}))

    with pytest.raises(BundleError, match="measured with other experts than"):
        require_skipping(bundle)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"mean_nats": 0.02}, "over budget_nats"), ({"thresholds": [1.5]}, "between 0 and 1"), ({"n": 0}, "n: ")],
)
def test_a_broken_record_is_named(bundle: Bundle, change: dict[str, Any], said: str) -> None:
    path = keep_skipping(bundle, record(bundle))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    with pytest.raises(BundleError, match=said):
        require_skipping(bundle)


def test_verify_takes_a_record_and_names_a_broken_one(bundle: Bundle) -> None:
    path = keep_skipping(bundle, record(bundle))
    assert bundle_mistakes(bundle) == []
    assert Bundle.load(bundle.root).sha256 == bundle.sha256

    path.write_text("{")

    (mistake,) = bundle_mistakes(bundle)
    assert SKIPPING in mistake


def test_the_fit_stays_within_its_budget_and_leaves_out_what_it_may(bundle: Bundle, sets: Path, tmp_path: Path) -> None:
    settings = Settings.load(cache_dir=tmp_path, threads=1)

    def fit(budget: float) -> SkipRecord:
        return fit_skipping(
            bundle, sets, settings=settings, budget_nats=budget, blocks=2, replies=4, max_tokens=6, seed=3
        )

    tight, loose = fit(1e-9), fit(10.0)

    assert tight.mean_nats <= 1e-9
    assert loose.thresholds == (LEVELS[-1],) * 2 or loose.skipped == 1.0
    assert loose.skipped >= tight.skipped
    assert 0 < loose.mean_nats <= 10
    assert loose.n > 0


def test_shares_count_experts_with_a_weight_only() -> None:
    assert shares((0.5,), [Weights(1, 0, 0, 0)]) == (0.0, 1.0)
    assert shares((0.0,), [LITTLE]) == (0.0, 0.0)
    assert shares((0.2, 0.2), [LITTLE]) == (pytest.approx(2 / 3), 0.0)


def test_the_command_writes_the_record(bundle: Bundle, sets: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HHH_ROUTER_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HHH_ROUTER_THREADS", "1")
    given = ["--bundle", str(bundle.root), "--data", str(sets), "--replies", "3", "--max-tokens", "4", "--blocks", "1"]

    found = CliRunner().invoke(app, ["bundle", "skip", *given, "--budget", "5"])

    assert found.exit_code == 0, found.output
    assert "of experts are not run" in found.output
    assert SkipRecord.model_validate_json((bundle.root / SKIPPING).read_text()).budget_nats == 5
