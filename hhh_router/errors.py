"""The error tree, organised by what the reader does next.

Every error carries a stable ``code`` and a ``hint`` that says what to do. One table here maps classes to HTTP
statuses and exit codes; no other place does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hhh_router.types import Decision


class HHHRouterError(Exception):
    """Base of everything this package raises on purpose."""

    code = "error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args, self.__dict__)  # a subclass's own arguments need not be kept apart

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message


def _again(kind: type[HHHRouterError], args: tuple[Any, ...], state: Mapping[str, Any]) -> HHHRouterError:
    """An error that came from another process."""
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(HHHRouterError):
    """A file has to be fixed."""

    code = "config_error"


class PolicyError(ConfigError):
    """A policy file is wrong; the message lists every mistake with file:line."""

    code = "policy_error"


class BundleError(ConfigError):
    """A bundle or its backbone is missing, corrupt or mismatched."""

    code = "bundle_error"


class SettingsError(ConfigError):
    """A setting (environment or file) is wrong."""

    code = "settings_error"


class KeyRejected(SettingsError):
    """A server does not take the key it was given."""

    code = "invalid_api_key"


class DataError(ConfigError):
    """Training, calibration or evaluation data cannot be used as it is."""

    code = "data_error"


class RequestError(HHHRouterError):
    """The call has to be fixed."""

    code = "request_error"


class InvalidRequest(RequestError):
    """The request is malformed."""

    code = "invalid_request"


class UnknownRequest(RequestError):
    """Nobody remembers a request of that id."""

    code = "request_not_found"


class ContextTooLong(RequestError):
    """The text does not fit the model's context window."""

    code = "context_length_exceeded"


class PolicyNotAllowed(RequestError):
    """The caller asked for a policy that does not exist or that the settings do not allow."""

    code = "policy_not_allowed"


class BackendError(HHHRouterError):
    """Something behind the door failed; trying again may help."""

    code = "backend_error"


class ReaderError(BackendError):
    """The router's reading failed."""

    code = "reader_error"


class GeneratorError(BackendError):
    """Generation failed."""

    code = "generator_error"


class UpstreamError(BackendError):
    """The upstream model answered with an error, or not at all."""

    code = "upstream_error"

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        hint: str | None = None,
        body: Mapping[str, Any] | None = None,
        retry_after: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        """The upstream's HTTP status; None when it did not answer."""
        self.body = body
        """The upstream's own error body, when it sent JSON."""
        self.retry_after = retry_after
        """The upstream's ``Retry-After`` header."""


class NotReached(UpstreamError):
    """No connection to the upstream: nothing was sent, so asking again or elsewhere repeats nothing."""


class BackendTimeout(BackendError):
    """A deadline passed."""

    code = "timeout"


class DeadlineExceeded(BackendTimeout):
    """The deadline that the caller set passed, and nothing else was late: the server did what it could in that time."""

    code = "deadline_exceeded"


class Quarantined(GeneratorError):
    """This request made the model fail twice, so it is not tried again."""

    code = "quarantined"


class _ComeBack(BackendError):
    def __init__(self, message: str, *, hint: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s
        """Seconds after which it may work; None where nobody can tell."""


class Overloaded(_ComeBack):
    """Too much work is waiting, or more than could be done before the caller's deadline."""

    code = "overloaded"


class Unavailable(_ComeBack):
    """The engine is starting again, or shutting down."""

    code = "unavailable"


class MissingExtra(HHHRouterError):
    """An optional dependency is not installed."""

    code = "missing_extra"

    def __init__(self, extra: str, *, needed_for: str) -> None:
        super().__init__(f"{needed_for} needs the '{extra}' extra", hint=f"pip install 'hhh-router[{extra}]'")
        self.extra = extra


class Blocked(HHHRouterError):
    """Raised only by ``result.raise_for_decision()``: the policy stopped the reply."""

    code = "blocked"

    def __init__(self, decision: Decision) -> None:
        super().__init__(f"{decision.action} at {decision.checkpoint} by {decision.rule}: {decision.reason}")
        self.decision = decision


EXIT_ALLOW = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_BLOCKED = 3

# class → (HTTP status, exit code); the first entry that matches by isinstance wins
_OUTCOMES: tuple[tuple[type[HHHRouterError], int, int], ...] = (
    (Blocked, 400, EXIT_BLOCKED),
    (MissingExtra, 501, EXIT_USAGE),
    (PolicyNotAllowed, 403, EXIT_USAGE),
    (UnknownRequest, 404, EXIT_USAGE),
    (RequestError, 400, EXIT_USAGE),
    (KeyRejected, 401, EXIT_USAGE),
    (ConfigError, 500, EXIT_USAGE),
    (Overloaded, 429, EXIT_FAILURE),
    (Unavailable, 503, EXIT_FAILURE),
    (Quarantined, 500, EXIT_FAILURE),
    (DeadlineExceeded, 408, EXIT_FAILURE),  # the caller's own doing, as all 4xx are
    (BackendTimeout, 504, EXIT_FAILURE),
    (BackendError, 502, EXIT_FAILURE),
    (HHHRouterError, 500, EXIT_FAILURE),
)


def http_status(error: HHHRouterError) -> int:
    """The HTTP status a door answers with. An upstream's own 4xx is the caller's to fix, so it passes as it came.

    >>> http_status(ContextTooLong("9000 tokens"))
    400
    >>> http_status(UpstreamError("quota", status=429)), http_status(UpstreamError("crash", status=500))
    (429, 502)
    """
    if isinstance(error, UpstreamError) and error.status is not None and 400 <= error.status < 500:
        return error.status
    return next(status for kind, status, _ in _OUTCOMES if isinstance(error, kind))


def exit_code(error: HHHRouterError) -> int:
    """The exit code of the command line.

    >>> exit_code(PolicyError("line 3"))
    2
    """
    return next(code for kind, _, code in _OUTCOMES if isinstance(error, kind))
