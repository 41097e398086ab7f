"""Shared by every tier: a policy whose every rule a test can trigger."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("steady", deadline=None)  # a busy machine is no failure
settings.load_profile("steady")

WATCHFUL = """\
version: 3
name: watchful
weights: {{helpful: 1, harmless: 1, honest: 1}}
strength: 0.5
checkpoints:
  input:
    - {{when: {{needs.harmless: ">= 0.9"}}, then: refuse, message: "Not that."}}
    - {{when: {{needs.honest: ">= 0.9"}}, then: escalate}}
    - {{then: allow}}
  output:
    - {{when: {{outcomes.unsafe: ">= 0.9"}}, then: block, message: "Cut."}}
    - {{when: {{outcomes.untruthful: ">= 0.9"}}, then: regenerate, raise: {{honest: 0.75}}, message: "No true answer."}}
    - {{when: {{outcomes.unhelpful: ">= 0.9"}}, then: flag}}
    - {{then: allow}}
on_error: {on_error}
mode: {mode}
stream: {{window_tokens: 3}}
"""


@pytest.fixture(scope="session")
def watchful(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the policy; the keywords are its ``on_error`` and ``mode``."""

    def write(*, on_error: str = "closed", mode: str = "enforce") -> Path:
        path = tmp_path_factory.mktemp("policy") / "watchful.yaml"
        path.write_text(WATCHFUL.format(on_error=on_error, mode=mode))
        return path

    return write
