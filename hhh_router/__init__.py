"""Guardrail and routing middleware for LLM apps, around a calibrated mixture of helpful, harmless and honest experts."""
