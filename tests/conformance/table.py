"""docs/conformance.md: what came of every client, as one table with its reasons."""

from __future__ import annotations


def page(clients, results):
    return ""
