"""Measure one bundle and write ``figures.json`` and ``CARD.md`` into it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hhh_router.bundle import Bundle
from hhh_router.calibration import CalibrationFile, Calibrators
from hhh_router.errors import BundleError
from hhh_router.evaluation.behaviour import behaviour_figures
from hhh_router.evaluation.card import card
from hhh_router.evaluation.detection import BOOTSTRAPS, detection_figures
from hhh_router.interfaces.sdk import AsyncHHHRouter
from hhh_router.model.worker import open_reader
from hhh_router.policy import list_policies
from hhh_router.settings import Settings

MAX_TOKENS = 1024
# no bounds, no rules: fixed weights are applied exactly as they are given, and the router's own unchanged
_UNBOUND = """\
version: 1
name: unbound
weights: {helpful: 1.0, harmless: 1.0, honest: 1.0}
strength: 0.0
checkpoints:
  input: [{then: allow}]
  output: [{then: allow}]
on_error: closed
"""


def measure(
    name: str,
    data: Path,
    *,
    settings: Settings,
    rows: int,
    max_tokens: int,
    seed: int,
    on_progress: Callable[[str, int, int, str], None],
) -> list[Path]:
    """Run every part and write the results; the files written.

    Raises:
        BundleError: The bundle is not complete.
    """
    bundle = Bundle.load(name)
    bundle.verify()
    manifest = bundle.manifest
    if manifest.heads is None or manifest.calibrators is None:
        raise BundleError(f"{bundle.root}: has no heads or no calibrators", hint="train and calibrate it first")
    path = bundle.root / manifest.calibrators.path
    figures: dict[str, Any] = {
        "command": f"hhh-router evaluate --bundle {Path(name).name} --rows {rows} --max-tokens {max_tokens} "
        f"--seed {seed}",
        "seed": seed,
        "bootstraps": BOOTSTRAPS,
        # the manifest's own hash does not hold the figures' files, so this names exactly what was measured
        "bundle_parts": hashlib.sha256("".join(sorted(bundle.files().values())).encode()).hexdigest(),
        "versions": {p: version(p) for p in ("torch", "transformers", "peft", "hhh-router")},
    }
    figures["detection"] = _detection(bundle, settings, path, data, seed, on_progress)
    if rows:
        figures["behaviour_max_tokens"] = max_tokens
        figures["behaviour"] = asyncio.run(_behaviour(bundle, settings, data, rows, max_tokens, seed, on_progress))
    written = [bundle.root / "figures.json", bundle.root / "CARD.md"]
    written[0].write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    written[1].write_text(card(manifest, CalibrationFile.read(path), figures), encoding="utf-8")
    return written


def _detection(
    bundle: Bundle,
    settings: Settings,
    path: Path,
    data: Path,
    seed: int,
    on_progress: Callable[[str, int, int, str], None],
) -> list[dict[str, Any]]:
    manifest = bundle.manifest
    assert manifest.heads is not None
    reader, encoder = open_reader(bundle, settings)
    calibrators = Calibrators.load(path, heads_sha256=manifest.heads.sha256, dtype=manifest.backbone.dtype)
    return detection_figures(
        reader,
        encoder,
        calibrators,
        data,
        seed=seed,
        max_tokens=MAX_TOKENS,
        on_task=lambda done, total, note: on_progress("detection", done, total, note),
    )


async def _behaviour(
    bundle: Bundle,
    settings: Settings,
    data: Path,
    rows: int,
    max_tokens: int,
    seed: int,
    on_progress: Callable[[str, int, int, str], None],
) -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        unbound = Path(folder) / "unbound.yaml"
        unbound.write_text(_UNBOUND, encoding="utf-8")
        async with AsyncHHHRouter(
            bundle=str(bundle.root), cache_dir=settings.cache_dir, threads=settings.threads
        ) as router:
            return await behaviour_figures(
                router,
                str(unbound),
                list_policies(),
                data,
                rows=rows,
                max_tokens=max_tokens,
                seed=seed,
                on_step=lambda done, total, note: on_progress("behaviour", done, total, note),
            )
