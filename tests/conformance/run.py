"""Other people's clients against the real server, each in its own environment: ``make conformance``.

What came of each lies in ``runs/conformance/`` and is kept while neither the client's script and packages nor our code
changes, so a run that was interrupted goes on; then the table in docs/conformance.md is written. Exits 1 where
something failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hhh_router.bundle import Bundle
from hhh_router.model.fetch import backbone_status
from hhh_router.settings import Settings
from tests.conformance.catalogue import CLIENTS, Client
from tests.conformance.environments import Obstacle, prepare
from tests.conformance.table import page
from tests.e2e.loopback import listening

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent / "clients"
RESULTS = ROOT / "runs" / "conformance"
PAGE = ROOT / "docs" / "conformance.md"
OUR_CODE = (
    "hhh_router",
    "policies",
    "tests/conformance/scripted.py",
    "tests/conformance/lenient.yaml",
    "docs/clients.md",
)
"""What a result speaks of, beside the client's own script."""
LENIENT = ROOT / "tests" / "conformance" / "lenient.yaml"
THREADS = "2"
"""Of the real server; the clients wait for it."""


@contextmanager
def servers() -> Iterator[Callable[[str], str]]:
    """Names the base URL of the server called ``bundle`` or ``scripted``; starts it when it is first asked for."""
    installed = str(Path(sys.executable).with_name("hhh-router"))
    commands = {
        "bundle": [installed, "serve", "--port", "0"],
        "scripted": [sys.executable, "-m", "tests.conformance.scripted"],
    }
    urls: dict[str, str] = {}
    with ExitStack() as stack:

        def url(name: str) -> str:
            if name not in urls:
                environment = {
                    **os.environ,
                    "HHH_ROUTER_THREADS": THREADS,
                    "HHH_ROUTER_ALLOWED_POLICIES": f"balanced,{LENIENT}",
                    "PYTHONPATH": str(ROOT),
                }
                urls[name] = stack.enter_context(listening(commands[name], cwd=ROOT, env=environment))
            return urls[name]

        yield url


def backbone() -> Path:
    """The folder of the default bundle's backbone, with its tokenizer."""
    settings = Settings.load()
    bundle = Bundle.load(settings.bundle)
    return backbone_status(bundle.manifest.backbone, settings.cache_dir, root=bundle.root).path


def fingerprint(client: Client) -> str:
    """Changes with anything that a client's result depends on."""
    own = [SCRIPTS / client.script, *SCRIPTS.glob("probe.*"), *(SCRIPTS / extra for extra in client.files)]
    ours = [path for name in OUR_CODE for path in _files(ROOT / name)]
    digest = hashlib.sha256(repr(client).encode())
    for path in sorted({*own, *ours}):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path] if path.exists() else []
    return [p for p in path.rglob("*") if p.suffix in (".py", ".yaml")]


def ask(client: Client, url: Callable[[str], str], environments: Path) -> dict[str, Any]:
    """Run one client's script; what its features came to, or the one obstacle that was before all of them."""
    try:
        interpreter = prepare(client, environments)
    except Obstacle as error:
        return {"obstacle": str(error)}
    out, log = RESULTS / f"{client.slug}.found.json", RESULTS / f"{client.slug}.log"
    out.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {
        "CONFORMANCE_OUT": str(out),
        "CONFORMANCE_MODULES": str(environments / client.slug),
        "CONFORMANCE_PYTHON": sys.executable,
        "CONFORMANCE_TOKENIZER": str(backbone()),
        "PYTHONUNBUFFERED": "1",
        **client.environment,
    }
    for server in client.servers:
        environment[{"bundle": "CONFORMANCE_URL", "scripted": "CONFORMANCE_SCRIPTED_URL"}[server]] = url(server)
    command = [str(interpreter), str(SCRIPTS / client.script)]
    with log.open("wb") as written:
        try:
            code = subprocess.run(
                command, stdout=written, stderr=subprocess.STDOUT, env=environment, cwd=RESULTS,
                timeout=client.timeout_s, check=False,
            ).returncode  # fmt: skip
            ended = "" if code == 0 else f"the script ended with exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"the script did not end within {client.timeout_s:.0f} s"
    found: dict[str, Any] = json.loads(out.read_text("utf-8")) if out.exists() else {"versions": {}, "found": []}
    if ended:
        last = log.read_text("utf-8", "replace").strip().rpartition("\n")[2]
        found["broke"] = f"{ended}; its last line: {last[:200]}"
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run what has to be run and write the table; 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.run", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="clients whose name has this")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-conformance", metavar="FOLDER")
    parser.add_argument("--no-page", action="store_true", help="leave docs/conformance.md as it is")
    given = parser.parse_args(argv)
    chosen = [c for c in CLIENTS if not given.only or any(text.lower() in c.name.lower() for text in given.only)]
    RESULTS.mkdir(parents=True, exist_ok=True)
    results = {c.name: json.loads(p.read_text("utf-8")) for c in CLIENTS if (p := RESULTS / f"{c.slug}.json").exists()}
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with servers() as url, Progress(*columns, console=console) as progress:
        task = progress.add_task("clients", total=len(chosen))
        for client in chosen:
            progress.update(task, description=f"[bold]{client.name}")
            kept, mark = RESULTS / f"{client.slug}.json", fingerprint(client)
            before = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
            if given.again or before.get("fingerprint") != mark:
                before = {"fingerprint": mark, **ask(client, url, given.environments.resolve())}
                kept.write_text(json.dumps(before, indent=1), "utf-8")
            results = {**results, client.name: before}
            if not given.no_page:
                PAGE.write_text(page(CLIENTS, results), "utf-8")  # after each: a run may be interrupted
            progress.advance(task)
            console.print(f"{client.name}: {summary(before)}", highlight=False)
    return int(any(_failed(results.get(c.name, {})) for c in chosen))


def summary(result: dict[str, Any]) -> str:
    """One line of what came of a client."""
    if "obstacle" in result:
        return f"not tested: {result['obstacle']}"
    outcomes = [f["outcome"] for f in result["found"]]
    counts = ", ".join(f"{outcomes.count(o)} {o}" for o in ("pass", "fail", "not tested") if o in outcomes)
    failed = "; ".join(f"{f['feature']}: {f['told']}" for f in result["found"] if f["outcome"] == "fail")
    return "; ".join(filter(None, (counts, failed, result.get("broke", ""))))


def _failed(result: dict[str, Any]) -> bool:
    return "broke" in result or any(f["outcome"] == "fail" for f in result.get("found", ()))


if __name__ == "__main__":
    sys.exit(main())
