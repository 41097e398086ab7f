"""LiteLLM's SDK and proxy: the tests of `make test-litellm`, in the environment that it sets up."""

import os
import re
import subprocess
from pathlib import Path

from probe import NotTested, feature, holds, run

ROOT = Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".venv-litellm" / "bin" / "python"


def tested(*arguments: str) -> str:
    if not PYTHON.exists():
        raise NotTested("its environment is not there: `make test-litellm` sets it up")
    done = subprocess.run(
        [str(PYTHON), "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )  # fmt: skip
    print(done.stdout[-6000:], done.stderr[-2000:])
    last = done.stdout.strip().rpartition("\n")[2]
    holds(done.returncode == 0, last)
    return f"{' '.join(re.findall(r'[0-9]+ passed', last))}"


@feature("chat")
def sdk(_: str) -> str:
    return f"SDK, tests/litellm/test_provider.py: {tested('tests/litellm/test_provider.py')}"


@feature("own checks")
def proxy(_: str) -> str:
    return f"proxy with docs/litellm-proxy.yaml, tests/litellm/test_proxy.py: {tested('tests/litellm/test_proxy.py')}"


run()
