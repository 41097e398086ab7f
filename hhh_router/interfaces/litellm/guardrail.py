"""LiteLLM's own client of the guardrail endpoint, made to hold streams back.

In a proxy's configuration: ``guardrail: hhh_router.interfaces.litellm.guardrail.HHHRouterGuardrail``, with the
parameters of ``generic_guardrail_api``.
"""

from __future__ import annotations

from typing import Any

from litellm.proxy.guardrails.guardrail_hooks.generic_guardrail_api import GenericGuardrailAPI


class HHHRouterGuardrail(GenericGuardrailAPI):  # type: ignore[misc]  # where LiteLLM is not installed
    """As ``generic_guardrail_api``, and no chunk of a stream leaves before a reading that covers it was judged.

    Every ``streaming_sampling_rate`` chunks are read together and then let out, on each of LiteLLM's wires. The plain
    guardrail reads as often but lets the chunks between two readings out unread.
    """

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        self.streaming_buffer_until_moderated = True
        self.streaming_buffer_release_on_scan = True

    async def apply_guardrail(self, inputs: Any, request_data: Any, input_type: Any, logging_obj: Any = None) -> Any:
        """As it is: LiteLLM asks only guardrails whose very class has this method, and skips one that inherits it."""
        return await super().apply_guardrail(inputs, request_data, input_type, logging_obj=logging_obj)
