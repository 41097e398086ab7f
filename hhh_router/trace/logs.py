"""Logs of a command, with secrets replaced, also those that an exception's message or a library brings."""

from __future__ import annotations

import logging

from hhh_router.trace.redact import Redactor


class RedactingFormatter(logging.Formatter):
    """Formats as another does, and replaces secrets in all of it: message, arguments and traceback.

    Args:
        redactor: Replaces.
        inner: Formats.
    """

    def __init__(self, redactor: Redactor, inner: logging.Formatter) -> None:
        super().__init__()
        self._redactor = redactor
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return self._redactor.text(self._inner.format(record))


def log_to_stderr(redactor: Redactor) -> None:
    """What a command's process logs goes to standard error, without secrets; handlers that are there are kept."""
    logging.basicConfig(format="%(asctime)s %(message)s")
    for handler in logging.getLogger().handlers:
        if not isinstance(handler.formatter, RedactingFormatter):
            handler.setFormatter(RedactingFormatter(redactor, handler.formatter or logging.Formatter()))
