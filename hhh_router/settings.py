"""Where and how this deployment runs: environment variables ``HHH_ROUTER_*``, or keywords in code.

Policies say what is allowed, the bundle's manifest what the model is, recipes how it was trained. No key of those
appears here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import platformdirs
from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from hhh_router.errors import SettingsError

DEFAULT_BUNDLE = "smollm2-135m"
DEFAULT_POLICY = "balanced"
SECRETS_DIR = ("HHH_ROUTER_SECRETS_DIR", "CREDENTIALS_DIRECTORY")
"""Variables that may name a folder of secrets, the first that is set; systemd sets the second one."""


def default_cache_dir() -> Path:
    """The user's cache folder for this package, e.g. ``~/.cache/hhh-router``."""
    return Path(platformdirs.user_cache_dir("hhh-router", appauthor=False))


class Settings(BaseSettings):
    """Settings of one deployment; every field can be set as ``HHH_ROUTER_<FIELD>``, or in a file of that name.

    Files count in the folder that ``HHH_ROUTER_SECRETS_DIR`` names; the environment counts more.
    """

    model_config = SettingsConfigDict(
        env_prefix="HHH_ROUTER_",
        env_ignore_empty=True,  # how compose files and shells leave a variable out
        frozen=True,
        extra="forbid",
    )

    bundle: str = DEFAULT_BUNDLE
    """Name of a bundle found under ``adapters/``, or a path to one."""
    policy: str = DEFAULT_POLICY
    """Default policy: the name of a shipped one, or a path to a YAML file."""
    allowed_policies: Annotated[tuple[str, ...] | None, NoDecode] = None
    """Policies a caller may pick besides the default, comma-separated; None allows every shipped one."""
    candidate: str | None = None
    """Policy that is asked beside the default one and recorded, and never acts: a shipped one's name, or a path."""
    candidate_told: bool = False
    """Tell clients too what the candidate would have decided, in their ``hhh`` block."""
    policy_reload_s: float = Field(default=2.0, ge=0)
    """Seconds between two looks at the policies' files; a changed one is taken over once it is valid. 0 never looks."""
    receipts_file: Path | None = None
    """File that gets a signed receipt of every request; needs ``receipts_key_file``."""
    receipts_key_file: Path | None = None
    """PEM file of the Ed25519 private key that signs receipts."""
    cache_dir: Path = Field(default_factory=default_cache_dir)
    """Where converted backbones are kept."""
    redact_file: Path | None = None
    """File of further secrets, one regular expression a line; what matches reaches no log, record, span or webhook."""
    redact_pii: Annotated[tuple[str, ...], NoDecode] = ()
    """What says who somebody is and reaches none of them, comma-separated: ``EMAIL_ADDRESS``, … (extra ``pii``)."""
    threads: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    """Threads the model may use; more than there are cores is very slow."""
    device: str = "cpu"
    """torch device of the embedded model, such as ``cpu`` or ``cuda:0``."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision the backbone runs in. ``auto``: the bundle's, or ``float32`` on a CPU that has to emulate that."""
    quantise: Literal["none", "int8"] = "none"
    """Weights of the decode steps of few replies. ``int8``: on a CPU, where the bundle has a record that it may be."""
    skip_experts: bool = False
    """Do not run experts of a weight below the thresholds that the bundle's ``skipping.json`` holds."""
    engine: Literal["auto", "thread", "process"] = "auto"
    """Where the embedded model runs. ``auto``: behind a server in a process of its own, which is started again when it
    dies; elsewhere on a thread of this process."""
    engine_stuck_s: float = Field(default=120.0, gt=0)
    """An engine's process that stays at one step for longer is stopped and started again, in seconds."""
    allow_uncalibrated: bool = False
    """Start although no calibrator fits; every number is then labelled ``calibrated: false``."""
    guard_batch_tokens: int = Field(default=2048, ge=64)
    """Most tokens (padding included) of one guard batch."""
    max_rows: int = Field(default=16, ge=1)
    """Replies that are decoded together."""
    kv_tokens: int = Field(default=32_768, ge=256)
    """Room for keys and values of all replies together: rows times the longest prompt + reply among them, in tokens."""
    prefix_tokens: int = Field(default=4096, ge=0)
    """Tokens of earlier chats whose keys and values are kept for prompts that begin alike; 0 keeps none."""
    session_tokens: int = Field(default=32_768, ge=0)
    """Tokens of others' answers, with their prompts, whose lower keys and values are kept while they are read."""
    max_waiting: int = Field(default=256, ge=1)
    """Chats that may wait for a row; one more is turned away."""
    max_waiting_tokens: int = Field(default=131_072, ge=256)
    """Tokens of waiting chats' prompts; more are turned away."""
    max_batch_items: int = Field(default=10_000, ge=1)
    """Most texts one ``guard`` or ``route`` call may hold."""
    max_body_bytes: int = Field(default=4_000_000, ge=1024)
    """Largest request body a server reads, in bytes."""
    request_timeout_s: float = Field(default=120.0, gt=0)
    """Deadline of one request, in seconds."""
    otel: Literal["off", "on", "content"] = "off"
    """OpenTelemetry spans of a server's requests (extra ``otel``); ``content``: with prompts and replies in them."""
    api_key: SecretStr | None = None
    """Key clients must send as ``Authorization: Bearer``; required when a server listens beyond loopback."""
    api_keys_file: Path | None = None
    """YAML file of further keys, hashed, each with what it opens and how much it may ask for."""
    audit_url: SecretStr | None = None
    """Where a proxy keeps its audit when neither an option nor its file says: ``postgresql://user:password@host/name``."""
    guardrail_tenant: Literal["key", "key_alias", "user_id", "team_id", "team_alias", "org_id"] = "key"
    """Whose traffic LiteLLM's guardrail is asked about. ``key``: the asker's; else what LiteLLM says of its caller."""
    hold_s: float = Field(default=120.0, gt=0, le=86_400)
    """Seconds that a call which a policy holds waits to be approved; then it is denied."""
    hold_webhook: str | None = Field(default=None, pattern=r"^https?://[^\s]+$")
    """URL that is told of every call that is held."""
    webhook_secret: SecretStr | None = None
    """Signs what webhooks are told (HMAC-SHA256)."""
    feedback: Path | None = None
    """SQLite file in which requests are remembered and labels are kept. None: a server keeps them in memory, until it
    ends; elsewhere nothing is remembered."""
    feedback_content: Literal["hash", "full"] = "hash"
    """``full`` keeps the texts of remembered requests and replies too, secrets replaced."""
    feedback_requests: int = Field(default=10_000, ge=1)
    """Requests without a label that are remembered."""
    feedback_days: float = Field(default=30.0, gt=0)
    """Days after which they are forgotten. What has a label stays."""
    upstream_api_key: SecretStr | None = None
    """Key the proxy sends upstream when the client sends none."""

    @classmethod
    def load(cls, **overrides: object) -> Settings:
        """Read the environment and the folder of secrets, with keywords on top.

        Raises:
            SettingsError: A value is wrong; the message lists every one.
        """
        given: dict[str, object] = {}
        for name in cls.model_fields:
            variable = f"HHH_ROUTER_{name.upper()}"
            if variable not in os.environ and (kept := read_secret(variable, os.environ)) is not None:
                given[name] = kept
        given |= {k: v for k, v in overrides.items() if v is not None}
        for listed in ("allowed_policies", "redact_pii"):
            names = given.get(listed, os.environ.get(f"HHH_ROUTER_{listed.upper()}") or None)  # empty is none
            if isinstance(names, str):
                given[listed] = _split(names)
        try:
            return cls(**given)  # type: ignore[arg-type]  # validated by pydantic
        except ValidationError as error:
            lines = [
                f"HHH_ROUTER_{'_'.join(map(str, e['loc'])).upper()}: {e['msg']} (found {e['input']!r})"
                for e in error.errors()
            ]
            raise SettingsError("\n".join(lines), hint="correct these settings") from error


def read_secret(name: str, environ: Mapping[str, str]) -> str | None:
    """The value of a variable, or of the file of that name in the folder of secrets; None where there is neither.

    Raises:
        SettingsError: The folder is none, or the file cannot be read.
    """
    if name in environ:
        return environ[name]
    folder = _secrets_dir(environ)
    if folder is None or not (folder / name).is_file():
        return None
    try:
        return (folder / name).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is no UTF-8"
        raise SettingsError(
            f"{folder / name} cannot be read ({why})", hint="correct the file, or who may read it"
        ) from error


def _secrets_dir(environ: Mapping[str, str]) -> Path | None:
    for variable in SECRETS_DIR:
        if given := environ.get(variable):
            if not Path(given).is_dir():
                raise SettingsError(
                    f"{variable}: {given} is no folder", hint="name a folder with a file for each secret"
                )
            return Path(given)
    return None


def _split(names: str) -> tuple[str, ...]:
    return tuple(n.strip() for n in names.split(",") if n.strip())
