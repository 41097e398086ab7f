"""OpenTelemetry spans of chats and judgements, by the semantic conventions for generative AI. No text unless asked for.

Only the API is used: where spans go is the deployment's to say (``opentelemetry-instrument hhh-router serve``, with
``OTEL_EXPORTER_OTLP_ENDPOINT`` and the like). A client's ``traceparent`` is the parent where no other instrumentation
has opened a span before.

Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/ (status: development).
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hhh_router.errors import MissingExtra
from hhh_router.interfaces.server.chat import ChatResponse
from hhh_router.interfaces.server.choices import strictest
from hhh_router.pipeline import ChatFinished
from hhh_router.settings import Settings
from hhh_router.trace.block import Metadata
from hhh_router.trace.redact import Redactor
from hhh_router.types import ChatRequest, Message

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Handler = Callable[[Request], Awaitable[Response]]
PROVIDER: Final = "hhh-router"
_HEADERS: Final = ("action", "policy", "confidence", "mixture", "request-id")
"""Of a reply to one judged text, as ``x-hhh-…``."""


class Tracing:
    """Makes spans."""

    def __init__(self, *, content: bool, redactor: Redactor | None = None) -> None:
        """Find OpenTelemetry.

        Args:
            content: Put prompts and replies into spans, with secrets replaced.
            redactor: Replaces them.

        Raises:
            MissingExtra: It is not installed.
        """
        try:
            from opentelemetry import propagate, trace
        except ImportError as error:
            raise MissingExtra("otel", needed_for="HHH_ROUTER_OTEL") from error
        self._trace, self._extract = trace, propagate.extract
        self._tracer = trace.get_tracer("hhh_router")
        self._content = content
        self._redactor = redactor or Redactor()

    @classmethod
    def from_settings(cls, settings: Settings, redactor: Redactor | None = None) -> Tracing | None:
        """None where it is switched off.

        Raises:
            MissingExtra: It is switched on, and OpenTelemetry is not installed.
        """
        return None if settings.otel == "off" else cls(content=settings.otel == "content", redactor=redactor)

    def chat(self, request: Request, response: ChatResponse) -> Traced:
        """The same reply, with a span around its making."""
        return Traced(self, request, response)

    def judging(self, path: str, work: Handler) -> Handler:
        """The same endpoint, with a span around its work; many texts of one call share it."""

        async def traced(request: Request) -> Response:
            about = {"gen_ai.operation.name": "guard", "gen_ai.provider.name": PROVIDER, "url.path": path}
            with self.span(request, f"guard {path}", about) as span:
                response = await work(request)
                span.set_attribute("http.response.status_code", response.status_code)
                for name in _HEADERS:
                    if (value := response.headers.get(f"x-hhh-{name}")) is not None:
                        span.set_attribute(f"hhh.{name.replace('-', '_')}", self._redactor.text(value))
                return response

        return traced

    @contextmanager
    def span(self, request: Request, name: str, about: Mapping[str, Any]) -> Iterator[Span]:
        """A span under the caller's, or under that of whoever watches this server."""
        inside = self._trace.get_current_span().get_span_context().is_valid
        context = None if inside else self._extract(dict(request.headers))
        kind = self._trace.SpanKind.INTERNAL  # as for models that run in the same service
        with self._tracer.start_as_current_span(
            self._redactor.text(name),
            context=context,
            kind=kind,
            attributes=self._redacted(about),
            record_exception=False,  # a message may repeat what somebody wrote
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except Exception as error:
                self._failed(span, error)
                raise

    @contextmanager
    def of_chat(self, request: Request, response: ChatResponse) -> Iterator[None]:
        """A span around the making of a reply; what came of it is told at the end."""
        asked, model = response.requests, response.call.model
        with self.span(request, f"chat {model}", _asked(asked, model)) as span:
            try:
                yield
            finally:
                if response.done:
                    span.set_attributes(self._redacted(_answered(asked, response.done, model)))
                if self._content:
                    span.set_attribute("gen_ai.input.messages", self._messages(asked[0].messages))
                    span.set_attribute("gen_ai.output.messages", self._replies(response.done))
                if (error := response.error) is not None:
                    self._failed(span, error)
                elif not response.is_finished:
                    self._failed(span, "cancelled")

    def _redacted(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """What a caller may have chosen, a model's name or an id, without secrets."""
        return {name: self._redactor.value(value) for name, value in attributes.items()}

    def _messages(self, messages: Sequence[Message]) -> str:
        return json.dumps([{"role": m.role, "parts": self._parts(m.content)} for m in messages])

    def _replies(self, done: Sequence[ChatFinished]) -> str:
        told = [{"role": "assistant", "parts": self._parts(d.text), "finish_reason": d.finish_reason} for d in done]
        return json.dumps(told)

    def _parts(self, text: str) -> list[dict[str, str]]:
        return [{"type": "text", "content": self._redactor.text(text)}]

    def _failed(self, span: Span, error: Exception | str) -> None:
        kind = error if isinstance(error, str) else str(getattr(error, "code", type(error).__name__))
        span.set_attribute("error.type", kind)
        span.set_status(self._trace.Status(self._trace.StatusCode.ERROR))


class Traced(Response):
    """A reply with a span around its making."""

    def __init__(self, tracing: Tracing, request: Request, response: ChatResponse) -> None:
        super().__init__()
        self._tracing, self._request, self._response = tracing, request, response

    @property
    def is_finished(self) -> bool:
        """Whether the reply has been sent to its end."""
        return self._response.is_finished

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as ASGI has it."""
        with self._tracing.of_chat(self._request, self._response):
            await self._response(scope, receive, send)


def _asked(requests: Sequence[ChatRequest], model: str) -> dict[str, Any]:
    sampling = requests[0].sampling
    told = {
        "model": model,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or None,
        "seed": sampling.seed,
        "stop_sequences": list(sampling.stop) or None,
        "choice.count": len(requests) if len(requests) > 1 else None,
    }
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.output.type": "text" if sampling.json_schema is None else "json",
        **{f"gen_ai.request.{name}": value for name, value in told.items() if value is not None},
    }


def _answered(requests: Sequence[ChatRequest], done: Sequence[ChatFinished], model: str) -> dict[str, Any]:
    """Of several replies the finish reasons and tokens of all, and the block of the one that was judged hardest."""
    block = strictest(done)
    prompts = {r.request_id: r.messages for r in requests}
    read = {prompts.get(d.metadata.request_id): d.usage.prompt_tokens for d in done}  # once for replies to one prompt
    return {
        "gen_ai.response.id": requests[0].request_id,
        "gen_ai.response.model": block.mixture or model,
        "gen_ai.response.finish_reasons": [d.finish_reason for d in done],
        "gen_ai.usage.input_tokens": sum(read.values()),
        "gen_ai.usage.output_tokens": sum(d.usage.completion_tokens for d in done),
        **_block(block),
    }


def _block(block: Metadata) -> dict[str, Any]:
    """What was decided and applied, under ``hhh.``."""
    return {
        "hhh.request_id": block.request_id,
        "hhh.policy": f"{block.policy.name}@{block.policy.version}",
        "hhh.policy.mode": block.policy.mode,
        "hhh.action": block.action,
        "hhh.rule": block.decisions[-1].rule if block.decisions else "",
        "hhh.confidence": block.confidence,
        "hhh.mixture": block.mixture or "none",
        "hhh.bundle": block.bundle.name,
        "hhh.calibrated": block.calibration.calibrated,
        "hhh.in_distribution": block.calibration.in_distribution,
        **{f"hhh.weights.{expert}": weight for expert, weight in block.weights.items()},
        **{f"hhh.needs.{need}": p for need, p in block.needs.items()},
        **{f"hhh.outcomes.{outcome}": p for outcome, p in block.outcomes.items()},
    }
