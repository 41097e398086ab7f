"""LiteLLM's doors: a provider for its SDK and its proxy (`chat`), and a guardrail for its proxy (`guardrail`).

>>> import litellm
>>> from hhh_router.interfaces.litellm import register
>>> register().close()
>>> [entry["provider"] for entry in litellm.custom_provider_map]
['hhh-router']
"""

from hhh_router.errors import MissingExtra

try:
    from hhh_router.interfaces.litellm.chat import PROVIDER, HHHRouterLLM, provider, register
except ModuleNotFoundError as missing:
    raise MissingExtra("litellm", needed_for="LiteLLM's provider") from missing

__all__ = ["PROVIDER", "HHHRouterLLM", "provider", "register"]
