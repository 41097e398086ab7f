"""What a bundle needs beyond whole files before it is released: figures of its own, within the evasion budget."""

from __future__ import annotations

import hashlib
import json

from hhh_router.bundle import Bundle
from hhh_router.calibration import CalibrationFile
from hhh_router.evaluation.evasion import RELEASE_BUDGET, over_budget

FIGURES = "figures.json"


def parts_hash(bundle: Bundle) -> str:
    """Names exactly what was measured: experts and their scales, heads and calibrators, not the figures beside them."""
    scales = [f"{d}{spec.blocks}" for d, spec in sorted(bundle.manifest.experts.items()) if spec.blocks]
    return hashlib.sha256("".join([*sorted(bundle.files().values()), *scales]).encode()).hexdigest()


def reader_hash(bundle: Bundle) -> str:
    """Names what a reading of a text alone depends on: heads, layers they read, and calibrators of needs and outcomes.

    Experts, gate and confidence may change without it.
    """
    from hhh_router.model.heads import weights_sha256

    manifest = bundle.manifest
    assert manifest.heads is not None
    assert manifest.calibrators is not None
    fitted = CalibrationFile.read(bundle.root / manifest.calibrators.path)
    modes = {name: mode.model_dump(mode="json", exclude={"confidence"}) for name, mode in fitted.modes.items()}
    parts = [manifest.backbone.sha256, list(manifest.heads.read_layers), modes]
    weights = weights_sha256(bundle.root / manifest.heads.path)
    return hashlib.sha256(json.dumps([weights, *parts], sort_keys=True).encode()).hexdigest()


def release_mistakes(bundle: Bundle) -> list[str]:
    """Why a bundle may not be released, one line each; empty when it may."""
    path = bundle.root / FIGURES
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{path}: no figures ({error}); run hhh-router evaluate --bundle {bundle.root.name}"]
    if not isinstance(figures, dict) or figures.get("bundle_parts") != parts_hash(bundle):
        return [f"{path}: measured on other experts, heads or calibrators than the bundle holds; evaluate it again"]
    return [f"{path}: {line}" for line in over_budget(figures.get("evasion") or [], RELEASE_BUDGET)]
