"""Check a bundle's files beyond their hashes, by loading each with the code that serves it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from hhh_router.bundle import Bundle, file_sha256
from hhh_router.calibration import Calibrators
from hhh_router.errors import BundleError, MissingExtra
from hhh_router.model.quantisation import QUANTISATION, QuantisationFile
from hhh_router.model.skipping import SKIPPING, SkipRecord
from hhh_router.types import DIMENSIONS

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_SCALE_TOLERANCE = 1e-9


def bundle_mistakes(bundle: Bundle) -> list[str]:
    """Everything that is wrong with a bundle, one line each; empty when it can be served.

    Files are compared with their hashes, experts with the manifest's rank, scale, layers and width, heads with the
    backbone's width, calibrators with the heads they were fitted for. NaN and infinity anywhere are mistakes. Records
    of quantisation and skipping need not be there, nor hold for these weights (serving asks for that), but must be
    readable.

    Raises:
        MissingExtra: torch or safetensors is not installed.
    """
    outside = [p for p in _paths(bundle) if not (bundle.root / p).resolve().is_relative_to(bundle.root.resolve())]
    if outside:
        return [f"{bundle.root}: {path} points outside the bundle" for path in outside]
    mistakes = []
    try:
        bundle.verify()
    except BundleError as error:
        mistakes += error.message.splitlines()
    for dimension in DIMENSIONS:
        mistakes += _expert_mistakes(bundle, dimension)
    mistakes += _heads_mistakes(bundle)
    mistakes += _calibrator_mistakes(bundle)
    mistakes += _record_mistakes(bundle)
    for pattern in _PICKLES:
        mistakes += [
            f"{path}: pickles can run code; a bundle holds safetensors only" for path in bundle.root.rglob(pattern)
        ]
    return list(dict.fromkeys(mistakes))


def _paths(bundle: Bundle) -> Iterator[Path]:
    manifest = bundle.manifest
    yield from (Path(spec.path) for spec in manifest.experts.values())
    yield from (Path(part.path) for part in (manifest.heads, manifest.calibrators) if part is not None)


def _expert_mistakes(bundle: Bundle, dimension: str) -> list[str]:
    try:
        from hhh_router.model.experts import load_expert
    except ImportError as error:
        raise MissingExtra("model", needed_for="checking the weights of a bundle") from error

    spec = bundle.manifest.experts[dimension]
    folder = bundle.root / spec.path
    try:
        expert = load_expert(folder, dimension)
    except BundleError as error:
        return [error.message]
    except (KeyError, TypeError) as error:
        return [f"{folder / 'adapter_config.json'}: no usable {error}"]
    mistakes = []
    if not math.isclose(expert.scale, spec.scale, rel_tol=_SCALE_TOLERANCE):
        mistakes.append(f"{folder / 'adapter_config.json'}: scale {expert.scale:g}, the manifest says {spec.scale:g}")
    if not expert.factors:
        mistakes.append(f"{folder}: no LoRA factors at all")
    first, layers = bundle.manifest.first_adapted_layer, bundle.manifest.backbone.layers
    for module, factor in expert.factors.items():
        where = f"{folder / 'adapter_model.safetensors'}: {module}"
        if factor.down.shape[0] != spec.rank:
            mistakes.append(f"{where} has rank {factor.down.shape[0]}, the manifest says {spec.rank}")
        layer = _layer_of(module)
        if layer is None or not first <= layer < layers:
            mistakes.append(f"{where} is outside the adapted layers {first} to {layers - 1}")
        if _reads_hidden(module) and factor.down.shape[1] != bundle.manifest.backbone.hidden_size:
            mistakes.append(
                f"{where} reads {factor.down.shape[1]} numbers, the backbone's states have "
                f"{bundle.manifest.backbone.hidden_size}"
            )
    return mistakes


def _heads_mistakes(bundle: Bundle) -> list[str]:
    from hhh_router.model.heads import Heads

    spec = bundle.manifest.heads
    if spec is None:
        return [f"{bundle.root}: no heads in the manifest, so nothing can be routed; run hhh-router train router"]
    path = bundle.root / spec.path
    mistakes = [
        f"{bundle.root}: heads read layer {layer}, above first_adapted_layer {bundle.manifest.first_adapted_layer}"
        for layer in spec.read_layers
        if layer > bundle.manifest.first_adapted_layer
    ]
    try:
        heads = Heads.load(path, layers=len(spec.read_layers), dim=bundle.manifest.backbone.hidden_size)
    except BundleError as error:
        return [*mistakes, error.message]
    for kind, found, meant in (("needs", heads.needs, spec.needs), ("outcomes", heads.outcomes, spec.outcomes)):
        if found != meant:
            mistakes.append(f"{path}: {kind} are {', '.join(found)}; the manifest says {', '.join(meant)}")
    return mistakes


def _calibrator_mistakes(bundle: Bundle) -> list[str]:
    spec, heads = bundle.manifest.calibrators, bundle.manifest.heads
    if spec is None:
        return [f"{bundle.root}: no calibrators in the manifest; run hhh-router calibrate"]
    if heads is None:
        return []
    try:
        sha256 = file_sha256(bundle.root / heads.path)
        Calibrators.load(bundle.root / spec.path, heads_sha256=sha256, dtype=bundle.manifest.backbone.dtype)
    except OSError:
        return []  # missing heads are reported above
    except BundleError as error:
        return error.message.splitlines()
    return []


def _record_mistakes(bundle: Bundle) -> list[str]:
    found = []
    for name, kind in ((QUANTISATION, QuantisationFile), (SKIPPING, SkipRecord)):
        path = bundle.root / name
        try:
            if path.exists():
                kind.read(path)
        except BundleError as error:
            found += error.message.splitlines()
    return found


def _layer_of(module: str) -> int | None:
    """The decoder layer in a module's name.

    >>> _layer_of("model.layers.16.mlp.up_proj"), _layer_of("lm_head")
    (16, None)
    """
    parts = module.split(".")
    for name, number in pairwise(parts):
        if name == "layers" and number.isdecimal():
            return int(number)
    return None


def _reads_hidden(module: str) -> bool:
    """True for the projections whose input is the layer's hidden state, in every family we know."""
    return module.rsplit(".", 1)[-1] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
