"""Other people's checkers over every file in ``deploy/``: what ``make lint-deploy`` runs, in an environment of its own.

Started with the Python of that environment, beside which hadolint and kubernetes-validate lie; what systemd brings is
used where it is there. Nothing of this project is imported.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
BIN = Path(sys.executable).parent
KUBERNETES = ("1.30.0", "1.37.0")
"""Oldest and newest that the manifests are checked against."""
MOST_EXPOSED = 2.0
"""Of systemd's own scale, on which 10 is a service without any protection."""


def main() -> int:
    """How many checkers found something; what they found is printed."""
    failed = 0
    for name, found in _checks():
        failed += bool(found)
        print(f"{'FOUND' if found else 'ok   '}  {name}")
        if found:
            print(found)
    return min(failed, 1)


def _checks() -> Iterator[tuple[str, str]]:
    """Each check with what it found; empty is good."""
    yield "hadolint Dockerfile", _said(str(BIN / "hadolint"), str(DEPLOY / "Dockerfile"))
    yield "compose-spec compose.yaml", _compose((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    for version in KUBERNETES:
        for file in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
            command = [str(BIN / "kubernetes-validate"), "--strict", "--quiet", "-k", version, str(file)]
            yield f"kubernetes-validate {version} {file.name}", _said(*command)
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        print("left out: systemd-analyze is not here, so no unit was checked")
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted((DEPLOY / "systemd").glob("*.service")):
            unit = Path(folder) / file.name  # where the program is installed it is checked too; here it need not be
            unit.write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", file.read_text()))
            yield f"systemd-analyze verify {file.name}", _said(analyze, "verify", str(unit))
            exposed = f"--threshold={MOST_EXPOSED * 10:.0f}"
            yield (
                f"systemd-analyze security {file.name}",
                _said(analyze, "security", "--offline=true", exposed, str(unit), quiet_when_good=True),
            )


def _said(*command: str, quiet_when_good: bool = False) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip()
    if done.returncode == 0:
        return "" if quiet_when_good else said
    return said or f"exit status {done.returncode}"


def _compose(text: str) -> str:
    import yaml
    from compose_spec import PyCompose

    filled = re.sub(r"\$\{\w+(?::-([^}]*)|:\?[^}]*)?\}", lambda m: m[1] if m[1] is not None else "given", text)
    merged = json.dumps(yaml.safe_load(filled))  # compose_spec knows no `<<`
    try:
        PyCompose.from_json(merged).validate()
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    sys.exit(main())
