"""Schemathesis over the OpenAPI document, against the real server with stand-ins for the model.

``python -m tests.conformance.fuzz`` exits 0 when schemathesis found nothing. It is a program of its own, named by
``--schemathesis``; `make fuzz` installs it into an environment of its own, for it brings another HTTP stack.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hhh_router.testing import FakeGenerator, FakeReader, fake_pipeline
from tests.e2e.loopback import served

KEY = "fuzz-key"
NOT_MEANT = ("positive_data_acceptance",)
"""Checks that cannot hold: no schema says that roles are in order, weights sum to 1 and texts are not blank."""
CONFIG = "generation.allow-extra-parameters = false\n"
"""A header that nobody knows is no mistake."""


def fuzz(program: str, *, examples: int, seconds: int, seed: int) -> int:
    """Its exit code: 0 when nothing was found."""
    reader = FakeReader({"bomb": {"needs.harmless": 6.0}, "poison": {"outcomes.unsafe": 6.0}})
    generator = FakeGenerator("one two three four", reader=reader)
    pipeline = fake_pipeline(reader=reader, generator=generator, api_key=KEY, max_body_bytes=1_000_000)
    with served(pipeline) as url, tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "schemathesis.toml").write_text(CONFIG, encoding="utf-8")
        root = url.removesuffix("/v1")
        command = [
            program, "run", f"{root}/openapi.json", "--url", root,
            "--header", f"Authorization:Bearer {KEY}",
            "--exclude-checks", ",".join(NOT_MEANT),
            "--max-examples", str(examples), "--max-time", str(seconds), "--seed", str(seed),
            "--continue-on-failure", "--warnings", "off",
        ]  # fmt: skip
        return subprocess.run(command, cwd=folder, check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit code is schemathesis' own."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.fuzz", description=__doc__)
    parser.add_argument("--schemathesis", default="schemathesis", help="the program")
    parser.add_argument("--examples", type=int, default=50, help="per endpoint and phase")
    parser.add_argument("--seconds", type=int, default=300, help="for all")
    parser.add_argument("--seed", type=int, default=17)
    given = parser.parse_args(argv)
    program = given.schemathesis
    if Path(program).exists():
        program = str(Path(program).resolve())
    return fuzz(program, examples=given.examples, seconds=given.seconds, seed=given.seed)


if __name__ == "__main__":
    sys.exit(main())
