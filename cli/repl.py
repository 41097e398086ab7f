"""The conversation of ``hhh-router chat`` on a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hhh_router.errors import HHHRouterError

from .render import error_console, explain_lines, parse_weights, show_reply
from .session import exit_status

if TYPE_CHECKING:
    from rich.console import Console

    from hhh_router.interfaces.sdk import HHHRouter
    from hhh_router.trace.block import Metadata
    from hhh_router.types import Weights

HELP = """\
/policy NAME|FILE   apply another policy from here on
/weights MIXTURE    pin the mixture (hhh@2-6-5-3, or base=0.1,helpful=0.9); /weights auto leaves it to the router
/why                explain the last decision
/reset              forget the conversation
/help               this list
/quit               leave (so does Ctrl-D)"""

Read = Callable[[str], str]
"""Asks for a line, as ``input`` does; raises EOFError at the end and KeyboardInterrupt on Ctrl-C."""


class Repl:
    """A conversation: what was said, and the policy and weights that hold for the next turn.

    Args:
        router: Answers.
        opening: Messages every conversation begins with.
        weights: Pinned mixture; None leaves it to the router.
        sampling: Keywords of ``HHHRouter.chat``.
        read: Where lines come from; ``input`` with readline's history by default.
        console: Where everything but the reply goes.
    """

    def __init__(
        self,
        router: HHHRouter,
        *,
        opening: Sequence[Any] = (),
        weights: Weights | None = None,
        sampling: dict[str, Any] | None = None,
        read: Read | None = None,
        console: Console | None = None,
    ) -> None:
        self._router = router
        self._opening = list(opening)
        self._messages = list(opening)
        self._policy: str | None = None
        self._weights = weights
        self._sampling = sampling or {}
        self._read = read or _input_with_history()
        self._console = console or error_console()
        self._last: Metadata | None = None

    def run(self) -> None:
        """Talk until /quit or the end of input."""
        self._tell("/help lists the commands, /quit leaves")
        while True:
            try:
                line = self._read("> ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._tell("")
                continue
            if line in ("/quit", "/exit"):
                return
            if not line:
                continue
            try:
                self._command(line) if line.startswith("/") else self._answer(line)
            except HHHRouterError as error:
                self._tell(str(error))
            except KeyboardInterrupt:
                self._tell("\n(stopped)")

    def _answer(self, prompt: str) -> None:
        turn = [*self._messages, {"role": "user", "content": prompt}]
        with self._router.chat(
            turn, policy=self._policy, weights=self._weights, stream=True, **self._sampling
        ) as reply:
            result = show_reply(reply, self._console)
        self._last = result.metadata
        if exit_status(result) == 0:  # a turn that was stopped would weigh on everything asked after it
            self._messages = [*turn, {"role": "assistant", "content": result.text}]

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/policy":
                self._set_policy(rest)
            case "/weights":
                self._weights = None if rest in ("", "auto") else parse_weights(rest)
                self._tell(f"weights: {self._weights.mixture if self._weights else 'left to the router'}")
            case "/why":
                self._tell("\n".join(explain_lines(self._last)) if self._last else "nothing was decided yet")
            case "/reset":
                self._messages = list(self._opening)
                self._tell("the conversation starts anew")
            case "/help":
                self._tell(HELP)
            case _:
                self._tell(f"no command {name}; /help lists them")

    def _set_policy(self, name: str) -> None:
        from hhh_router.policy import list_policies, load_policy

        if name:
            policy = load_policy(name)  # so that a mistake shows now, and not at the next turn
            self._policy = name
            self._tell(f"policy: {policy.name}@{policy.version}")
        else:
            self._tell(f"policy: {self._policy or 'the default'}; shipped: {', '.join(list_policies())}")

    def _tell(self, text: str) -> None:
        self._console.print(text, markup=False)


def _input_with_history() -> Read:
    with contextlib.suppress(ImportError):  # not on every platform; input() then has no history
        import readline  # noqa: F401  # its import is what gives input() a history, kept for this session only
    return input
