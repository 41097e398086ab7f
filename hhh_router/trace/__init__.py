"""What was measured, decided and applied: the metadata block, and the sinks that keep it."""

from hhh_router.trace.block import Metadata, metadata_schema
from hhh_router.trace.build import build_metadata, canonical_request, request_sha256, text_sha256
from hhh_router.trace.redact import redact, redact_text
from hhh_router.trace.sinks import JsonlSink, LogSink, NullSink, Sink

__all__ = [
    "JsonlSink",
    "LogSink",
    "Metadata",
    "NullSink",
    "Sink",
    "build_metadata",
    "canonical_request",
    "metadata_schema",
    "redact",
    "redact_text",
    "request_sha256",
    "text_sha256",
]
