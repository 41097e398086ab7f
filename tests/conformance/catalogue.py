"""Whose software is run against the server, and in what environment.

One more is one more entry here and one more script in ``clients/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FEATURES = (
    "chat", "stream", "tools", "agent loop", "JSON", "logprobs", "`n`", "refusal", "errors", "`hhh`", "responses",
    "messages", "completions", "decisions", "moderations", "models", "example", "own checks",
)  # fmt: skip
"""The columns of the table. ``example``: the one of docs/clients.md; ``own checks``: what a suite itself measures."""

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""Nothing is fetched from a hub."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Somebody else's software, and the script of ours that drives it."""

    slug: str
    """Its name in paths."""
    name: str
    """As the table has it."""
    script: str
    """File in ``clients/``; its suffix tells the language."""
    packages: tuple[str, ...] = ()
    """What its environment is made of, for pip or npm; none is the project's own environment."""
    told: str = ""
    """Its versions, where its script cannot tell them."""
    files: tuple[str, ...] = ()
    """What else in ``clients/`` its script needs."""
    servers: tuple[str, ...] = ("bundle", "scripted")
    """Which of ours it asks."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that it needs, mostly to stay off the network."""
    timeout_s: float = 300.0
    """For the whole script, on two slow cores."""

    @property
    def language(self) -> Literal["python", "node"]:
        """Which interpreter runs the script."""
        return "node" if self.script.endswith(".mjs") else "python"


CLIENTS = (
    Client(slug="openai-3", name="openai 3 (Python)", script="openai_python.py", packages=("openai==3.57.0",)),
    Client(slug="openai-2", name="openai 2 (Python)", script="openai_python.py", packages=("openai==2.54.0",)),
    Client(slug="openai-npm", name="openai (npm)", script="openai_npm.mjs", packages=("openai@7.55.0",)),
    Client(slug="anthropic", name="anthropic (Python)", script="anthropic_python.py", packages=("anthropic==2.14.0",)),
    Client(
        slug="anthropic-npm", name="anthropic (npm)", script="anthropic_npm.mjs", packages=("@anthropic-ai/sdk@1.14.0",)
    ),
    Client(
        slug="ai-npm",
        name="AI SDK (npm)",
        script="ai_npm.mjs",
        packages=("ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92", "zod@4.6.7"),
    ),
    Client(slug="typesafe-sdk", name="typesafe-sdk", script="typesafe.py", packages=("typesafe-sdk==0.7.5",)),
    Client(
        slug="pydantic-ai",
        name="Pydantic AI",
        script="pydantic_ai_agents.py",
        packages=("pydantic-ai-slim[openai]==2.68.0",),
    ),
    Client(
        slug="langchain-openai",
        name="LangChain",
        script="langchain_chat.py",
        packages=("langchain-openai==1.7.4", "langchain==1.5.2"),
    ),
    Client(slug="openai-agents", name="OpenAI Agents", script="openai_agents.py", packages=("openai-agents==0.24.0",)),
    Client(slug="instructor", name="instructor", script="instructor_types.py", packages=("instructor==1.17.0",)),
    Client(
        slug="compatcanary",
        name="CompatCanary",
        script="compatcanary.mjs",
        packages=("compatcanary@0.2.2",),
        servers=("bundle",),
    ),
    Client(
        slug="schemathesis",
        name="schemathesis",
        script="schemathesis_fuzz.py",
        files=("../fuzz.py",),
        packages=("schemathesis==4.32.5",),
        servers=(),
        timeout_s=900,
    ),
    Client(
        slug="lm-eval",
        name="lm-eval",
        script="lm_eval_local.py",
        packages=("lm-eval[api]==0.4.13", "transformers==5.23.0"),
        files=("capitals.jsonl",),
        servers=("bundle",),
        environment=OFFLINE,
        timeout_s=600,
    ),
    Client(
        slug="promptfoo",
        name="promptfoo",
        script="promptfoo.mjs",
        packages=("promptfoo@0.123.1", "node@22.23.3"),
        servers=("bundle",),
    ),
    Client(
        slug="garak",
        name="garak",
        script="garak_probes.py",
        packages=("garak==0.17.1",),
        servers=("bundle",),
        environment=OFFLINE,
        timeout_s=1200,
    ),
    Client(
        slug="litellm",
        name="LiteLLM",
        script="litellm_suite.py",
        told="litellm 1.106.2, openai 2.54.0",
        servers=(),
        timeout_s=1500,
    ),
)
