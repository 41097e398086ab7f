"""Schemathesis over the OpenAPI document, as `make fuzz` runs it, with fewer examples."""

import os
import re
import subprocess
import sys
from pathlib import Path

from probe import feature, holds, run

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES, SECONDS = "15", "240"


@feature("own checks")
def fuzz(_: str) -> str:
    program = Path(sys.executable).with_name("schemathesis")
    command = [os.environ["CONFORMANCE_PYTHON"], "-m", "tests.conformance.fuzz", "--schemathesis", str(program)]
    done = subprocess.run(
        [*command, "--examples", EXAMPLES, "--seconds", SECONDS],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    print(done.stdout[-6000:], done.stderr[-3000:])
    counted = re.findall(r"Generated[^\n]*|\d[\d,]* generated[^\n]*|Test cases:[^\n]*\n[^\n]*", done.stdout)
    holds(done.returncode == 0, f"exit code {done.returncode}; see the log")
    return f"no finding, seed 17. {' '.join(counted[-1].split()) if counted else ''}".strip()


run("schemathesis")
