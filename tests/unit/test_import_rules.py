"""Who may import whom: read from the source, so that a breach fails before it hurts."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hhh_router"

PURE = {"types", "errors", "tools", "calibration", "policy", "routing"}
"""Plain Python on a handful of floats."""
SHARED = PURE | {"protocols", "bundle", "settings", "trace"}
OFFLINE = {"data", "training", "evaluation"}

MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "errors": {"types"},
    "tools": {"types"},
    "protocols": {"types", "errors"},
    "bundle": {"types", "errors"},
    "settings": {"types", "errors"},
    "calibration": {"types", "errors", "routing", "trace"},
    "policy": {"types", "errors"},
    "routing": {"types", "errors"},
    "trace": {"types", "errors"},
    "pipeline": SHARED,
    "model": SHARED,
    "upstream": SHARED,
    "assemble": SHARED | {"pipeline", "model", "upstream"},
    "interfaces": SHARED | {"pipeline", "assemble"},
    "testing": SHARED | {"pipeline", "model"},
    "data": SHARED,
    "training": SHARED | {"pipeline", "model", "data"},
    "evaluation": SHARED | {"pipeline", "model", "upstream", "assemble", "data", "training", "interfaces"},
    "cli": SHARED | {"pipeline", "assemble", "interfaces"} | OFFLINE,
}
"""Part → the parts it may name. A part may always name itself."""

EXCEPTIONS: dict[str, set[str]] = {
    # fetching, and checking files: what comes before there is anything to assemble
    "cli/doctor.py": {"model.fetch"},
    "cli/session.py": {"model.fetch"},
    "cli/render.py": {"model.sources"},
    "cli/bundle.py": {"model.inspect", "model.quantisation", "model.skipping"},
    # makes a tiny random bundle with real experts; nothing that runs without torch names it
    "testing/tiny.py": {"training.experts"},
}

OUTSIDE: dict[str, set[str]] = {
    "torch": {"model", "training"},
    "transformers": {"model", "training"},
    "peft": {"model", "training"},
    "safetensors": {"model", "training"},
    "gguf": {"model"},
    "huggingface_hub": {"model"},
    "numpy": {
        "calibration/arrow",
        "calibration/conformal",
        "calibration/fit",
        "calibration/gates",
        "calibration/metrics",
        "model",
        "training",
        "evaluation",
        "data",
    },
    "scipy": {
        "calibration/conformal",
        "calibration/fit",
        "calibration/gates",
        "calibration/metrics",
        "model",
        "training",
        "evaluation",
        "data",
    },
    "matplotlib": {"training", "evaluation"},
    "starlette": {"interfaces/server", "interfaces/proxy", "interfaces/mcp"},
    "prometheus_client": {"interfaces/server"},
    "uvicorn": {"interfaces/server", "interfaces/proxy", "interfaces/mcp", "cli/serve", "cli/proxy"},
    "opentelemetry": {"interfaces/server/tracing"},
    "aiohttp": {"upstream/raw"},
    "httpx": {"interfaces/remote", "interfaces/webhook", "upstream"},
    "httpx2": {"interfaces/mcp"},
    "anyio": {"interfaces/mcp", "cli/mcp_proxy"},
    "mcp": {"interfaces/mcp"},
    "mcp_types": {"interfaces/mcp"},
    "litellm": {"interfaces/litellm", "upstream/litellm"},
    "typer": {"cli"},
    "rich": {"cli"},
    "cryptography": {"trace/receipts"},
    "psycopg": {"trace/audit/postgres"},
    "presidio_analyzer": {"trace/pii"},
}
"""Library → where it may be imported, as a folder or a file without its suffix."""

TORCH_TESTING = "testing/tiny"


def source_files() -> Iterator[tuple[str, Path]]:
    """Every module as ``part/…/file`` without its suffix, with its path. ``cli`` counts as a part of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).with_suffix("").as_posix(), path
    for path in sorted((ROOT / "cli").glob("*.py")):
        yield f"cli/{path.stem}", path


def imports(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """Every imported module with its line, also those inside functions; those for the type checker alone left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _running(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = f"hhh_router.{name}".replace("/", ".").split(".")
                base = ".".join([*here[: -node.level], *([base] if base else [])])
            yield base, node.lineno
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


def _running(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from _running(child)


MODULES = dict(source_files())


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_parts_it_may(name: str) -> None:
    part = name.split("/")[0]
    if part == "__init__":
        pytest.skip("names the public parts lazily")
    allowed = MAY_IMPORT[part] | {part}
    excused = EXCEPTIONS.get(f"{name}.py", set())

    breaches = []
    for module, line in imports(name, MODULES[name]):
        parts = module.split(".")
        if parts[0] != "hhh_router" or len(parts) < 2 or parts[1] not in MAY_IMPORT or parts[1] in allowed:
            continue
        if not any(".".join(parts[1:]).startswith(excuse) for excuse in excused):
            breaches.append(f"{MODULES[name]}:{line}: {module}")

    assert not breaches, f"{part} may import {', '.join(sorted(allowed))}"


@pytest.mark.parametrize("name", MODULES)
def test_a_library_stays_where_it_belongs(name: str) -> None:
    breaches = []
    for module, line in imports(name, MODULES[name]):
        homes = OUTSIDE.get(module.split(".")[0])
        if homes is None or name == TORCH_TESTING:
            continue
        if not any(name == home or name.startswith(f"{home}/") for home in homes):
            breaches.append(f"{MODULES[name]}:{line}: {module} belongs in {', '.join(sorted(homes))}")

    assert not breaches


def test_every_part_has_a_rule() -> None:
    parts = {name.split("/")[0] for name in MODULES} - {"__init__"}

    assert parts <= set(MAY_IMPORT)


def test_relative_imports_are_used_inside_cli_and_nowhere_else() -> None:
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        if name.startswith("cli/"):
            assert not [n.lineno for n in froms if (n.module or "").startswith("hhh_router.cli")], path
        else:
            assert not [n.lineno for n in froms if n.level], path


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.startswith("cli/")))
def test_a_command_file_imports_nothing_heavy_at_its_top(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {alias.name for n in top if isinstance(n, ast.Import) for alias in n.names}
    names |= {n.module or "" for n in top if isinstance(n, ast.ImportFrom) and not n.level}

    # repl.py and rows.py are no commands: they are imported by one when it runs
    light = (
        {"typer", "typer.core", "hhh_router.errors"} if name in ("cli/repl", "cli/rows") else {"typer", "typer.core"}
    )
    heavy = {n for n in names if n.split(".")[0] not in sys.stdlib_module_names} - light
    assert not heavy


@pytest.mark.parametrize("statement", ["import hhh_router", "import hhh_router; hhh_router.HHHRouter"])
def test_importing_the_package_loads_no_torch(statement: str) -> None:
    heavy = ("torch", "transformers", "peft", "safetensors", "numpy", "scipy", "starlette", "aiohttp")
    code = f"import sys; {statement}; print([m for m in {heavy!r} if m in sys.modules])"

    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert said.strip() == "[]"
