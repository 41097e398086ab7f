"""The one place where concrete parts meet: settings → Pipeline."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hhh_router.bundle import Bundle
from hhh_router.calibration import CalibrationFile, Calibrators
from hhh_router.calibration.drift import histograms
from hhh_router.calibration.evidence import UNCALIBRATED
from hhh_router.calibration.kept import KEPT, read_kept
from hhh_router.errors import BundleError, MissingExtra, SettingsError
from hhh_router.pipeline import Pipeline, PolicyStore
from hhh_router.pipeline.situation import PIPELINE
from hhh_router.policy import Door
from hhh_router.policy.lock import Deployed
from hhh_router.settings import Settings
from hhh_router.trace import LogSink, Sink
from hhh_router.trace.block import BundleRef
from hhh_router.trace.feedback_store import FeedbackStore
from hhh_router.trace.pii import find_pii
from hhh_router.trace.redact import Redactor, read_patterns

if TYPE_CHECKING:
    from hhh_router.model.engine import EmbeddedModel
    from hhh_router.upstream.litellm import LiteLLM
    from hhh_router.upstream.raw import RawClient

_log = logging.getLogger(__name__)


def build_pipeline(
    settings: Settings,
    *,
    sinks: Sequence[Sink] | None = None,
    serving: bool = False,
    door: Door = PIPELINE,
    redactor: Redactor | None = None,
) -> Pipeline:
    """Load policies, bundle and model, and put the path together. Blocks for seconds; may import torch.

    Args:
        settings: Where and how it runs.
        sinks: Where traces go; one INFO line a request by default.
        serving: Run the model in a process of its own, where the settings leave it open.
        door: What the policies may ask for.
        redactor: Replaces secrets in whatever is kept; made of the settings when not given.

    Raises:
        SettingsError: The file of patterns has mistakes, or another file cannot be used.
        PolicyError: A policy is wrong.
        BundleError: The bundle is missing, corrupt, for another backbone, or not calibrated for these heads.
        MissingExtra: torch is not installed.
    """
    policies = PolicyStore.from_settings(settings, door=door)  # the cheapest checks first
    redactor = redactor or open_redactor(settings)
    receipts = _receipts(settings)
    bundle = Bundle.load(settings.bundle)
    bundle.verify()
    policies.bind(deployed(bundle))
    own_process = settings.engine == "process" or (settings.engine == "auto" and serving and os.name == "posix")
    model, calibrators = (_supervised if own_process else _embedded)(bundle, settings)
    return Pipeline(
        reader=model.reader,
        generator=model.generator,
        calibrators=calibrators,
        policies=policies,
        bundle_ref=BundleRef(name=bundle.manifest.name, hash=bundle.sha256),
        backbone_sha256=bundle.manifest.backbone.sha256,
        sinks=((LogSink(),) if sinks is None else tuple(sinks)) + receipts,
        settings=settings,
        redactor=redactor,
        memory=None if settings.feedback is None else open_memory(settings),
        closers=(model.aclose,),
        drain=model.drain,
        load=lambda: model.engine.load,
    )


def open_redactor(
    settings: Settings, patterns: Sequence[re.Pattern[str]] = (), entities: Sequence[str] = ()
) -> Redactor:
    """What a deployment replaces before anything is kept: the usual secrets, and what its settings add.

    Args:
        settings: Name the file of patterns, and what says who somebody is.
        patterns: More of the former.
        entities: More of the latter.

    Raises:
        SettingsError: The file cannot be read or has mistakes, or nobody can find what is named.
        MissingExtra: What says who somebody is is to be found, and Presidio is not installed.
    """
    named = tuple(dict.fromkeys((*settings.redact_pii, *entities)))
    own = () if settings.redact_file is None else read_patterns(settings.redact_file)
    return Redactor(patterns=(*own, *patterns), also=find_pii(named) if named else None)


def open_memory(settings: Settings) -> FeedbackStore:
    """What remembers requests for feedback: in the settings' file, or in this process's memory.

    Raises:
        SettingsError: The file cannot be used.
    """
    return FeedbackStore(
        settings.feedback,
        content=settings.feedback_content,
        most=settings.feedback_requests,
        longest_s=settings.feedback_days * 86_400,
    )


def open_raw_client(max_connections: int = 1024) -> RawClient:
    """Connections to upstreams for a sidecar, so many at a time.

    Raises:
        MissingExtra: aiohttp is not installed.
    """
    try:
        from hhh_router.upstream.raw import RawClient
    except ImportError as error:
        raise MissingExtra("serve", needed_for="an upstream") from error
    return RawClient(max_connections=max_connections)


def open_litellm(
    model: str, *, place: str, api_key: str | None = None, api_base: str | None = None, drop_params: bool = False
) -> LiteLLM:
    """A model of any provider that LiteLLM knows. Importing LiteLLM takes seconds.

    Args:
        model: As LiteLLM names it.
        place: Where it is named, for messages.
        api_key: See `LiteLLM`.
        api_base: Likewise.
        drop_params: Likewise.

    Raises:
        MissingExtra: LiteLLM is not installed.
        SettingsError: It knows no such provider.
    """
    try:
        from hhh_router.upstream.litellm import LiteLLM

        return LiteLLM(model, api_key=api_key, api_base=api_base, drop_params=drop_params)
    except ImportError as error:
        raise MissingExtra("litellm", needed_for=place) from error
    except SettingsError as error:
        raise SettingsError(f"{place}: {error.message}", hint=error.hint) from error


def _receipts(settings: Settings) -> tuple[Sink, ...]:
    """The sink of signed receipts, where the settings name one."""
    if settings.receipts_file is None and settings.receipts_key_file is None:
        return ()
    if settings.receipts_file is None or settings.receipts_key_file is None:
        raise SettingsError(
            "receipts need a file and a key", hint="set HHH_ROUTER_RECEIPTS_FILE and HHH_ROUTER_RECEIPTS_KEY_FILE"
        )
    from hhh_router.trace.receipts import ReceiptSink

    return (ReceiptSink(settings.receipts_file, settings.receipts_key_file),)


def _embedded(bundle: Bundle, settings: Settings) -> tuple[EmbeddedModel, Calibrators]:
    """On a thread of this process; a wrong calibrator is found before the model is loaded."""
    try:
        from hhh_router.model.base import compute_dtype
        from hhh_router.model.worker import load_embedded
    except ImportError as error:
        raise MissingExtra("model", needed_for="the embedded model") from error
    dtype = compute_dtype(bundle.manifest.backbone, settings.device, settings.dtype)
    calibrators = load_calibrators(bundle, settings, dtype)
    return load_embedded(bundle, settings), calibrators


def _supervised(bundle: Bundle, settings: Settings) -> tuple[EmbeddedModel, Calibrators]:
    """In a process of its own, which tells the precision it runs in; this one imports no torch."""
    from hhh_router.model.supervisor import open_supervised

    model = open_supervised(bundle, settings)
    try:
        return model, load_calibrators(bundle, settings, model.description["dtype"])
    except BundleError:
        model.engine.close()
        raise


def deployed(bundle: Bundle) -> Deployed:
    """What a policy's lock has to be about.

    Raises:
        BundleError: Its calibrators, or the scores it keeps, cannot be read.
    """
    heads, calibrators = bundle.manifest.heads, bundle.manifest.calibrators
    kept = None
    if heads is not None and (bundle.root / KEPT).exists():
        kept = read_kept(bundle.root, heads_sha256=heads.sha256).sha256
    return Deployed(
        bundle_sha256=bundle.sha256,
        calibration_id=CalibrationFile.read(bundle.root / calibrators.path).id if calibrators else UNCALIBRATED,
        data_sha256=kept,
    )


def check_upstream(base_url: str) -> None:
    """Accept what an upstream can be reached by.

    Raises:
        SettingsError: It is no http(s) URL, or holds a password.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError(
            f"upstream {base_url!r} is no http(s) URL",
            hint="give the base URL a client would use, such as http://host:8000/v1",
        )
    if parts.username or parts.password:
        raise SettingsError(
            f"the upstream's URL for {parts.hostname} holds credentials", hint="set HHH_ROUTER_UPSTREAM_API_KEY instead"
        )


def load_calibrators(bundle: Bundle, settings: Settings, dtype: str | None = None) -> Calibrators:
    """The bundle's calibrators, checked against its heads and the precision that the backbone runs in.

    Args:
        bundle: Whose.
        settings: Whether uncalibrated numbers are allowed.
        dtype: What the backbone runs in; the manifest's own when not given.

    Raises:
        BundleError: There are none, or they were fitted for other heads or another precision, and the settings do not
            allow uncalibrated numbers; or what is kept of their rows cannot be read.
    """
    manifest = bundle.manifest
    if manifest.heads is None:
        raise BundleError(
            f"{bundle.root}: the bundle has no router heads", hint="train them: hhh-router train router RECIPE"
        )
    if manifest.calibrators is None:
        if not settings.allow_uncalibrated:
            raise BundleError(
                f"{bundle.root}: the bundle has no calibrators",
                hint="run hhh-router calibrate, or set HHH_ROUTER_ALLOW_UNCALIBRATED=true to go on without",
            )
        _log.warning("%s: no calibrators; every number is labelled uncalibrated", bundle.root)
        return Calibrators.none()
    calibrators = Calibrators.load(
        bundle.root / manifest.calibrators.path,
        heads_sha256=manifest.heads.sha256,
        dtype=dtype or manifest.backbone.dtype,
        allow_uncalibrated=settings.allow_uncalibrated,
    )
    references = calibrators.references()
    if any(r.bins is None for r in references.values()) and (bundle.root / KEPT).exists():
        kept = read_kept(bundle.root, heads_sha256=manifest.heads.sha256)
        calibrators = calibrators.with_spread(histograms(references, kept.rows))
    return calibrators
