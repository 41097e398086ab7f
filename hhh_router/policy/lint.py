"""What is no mistake in a policy, and most likely not meant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hhh_router.errors import PolicyError
from hhh_router.policy.decide import DEFAULT_MESSAGES
from hhh_router.policy.lock import EXPERT, fitted_rule
from hhh_router.policy.rules import Condition, Floor, Rule
from hhh_router.policy.schema import PASSING, Budget, Policy
from hhh_router.types import Action

_SEES = {"input": {"prompt"}, "output": {"response", "both"}}
"""What a reading can have seen at a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """One thing to look at again."""

    code: str
    """Stable, such as ``no-stop``."""
    place: str
    """Where, such as ``checkpoints.input[1]``."""
    line: int | None
    text: str
    """What was found, and what to do."""

    def __str__(self) -> str:
        at = self.place if self.line is None else f"line {self.line}  {self.place}"
        return f"{at}: {self.text} [{self.code}]"


def lint(policy: Policy) -> list[Hint]:
    """Everything worth a second look, in the order of the file's parts."""
    return [*_modes(policy), *_floors(policy), *_checkpoints(policy), *_rest(policy)]


def _modes(policy: Policy) -> Iterator[Hint]:
    if policy.mode == "shadow":
        yield _hint("shadow", "mode", "nothing is enforced; set enforce once the decisions look right")
    if policy.on_error == "open":
        yield _hint("open", "on_error", "when a part fails, everything passes; closed refuses instead")


def _floors(policy: Policy) -> Iterator[Hint]:
    for floor in policy.floors:
        if (limit := _stopped_before(policy, floor)) is not None:
            text = f"where it would hold the request is stopped already ({limit}); lower its limit, or remove it"
            yield _hint("idle-floor", floor.place, text, floor.line)


def _stopped_before(policy: Policy, floor: Floor) -> Condition | None:
    """The condition of a rule at input that stops whatever the floor would hold for."""
    for rule in policy.checkpoints["input"]:
        if rule.shadow or rule.rollout is not None:
            continue
        covered = all(any(c.implies(w) for c in floor.when) for w in rule.when)
        if covered and rule.when:
            return rule.when[0] if rule.then.stops else None
    return None


def _checkpoints(policy: Policy) -> Iterator[Hint]:
    for checkpoint, rules in policy.checkpoints.items():
        acting = [r for r in rules if not r.shadow and (r.then.stops or r.then is Action.REGENERATE)]
        if not acting and checkpoint in ("input", "output"):
            yield _hint("no-stop", f"checkpoints.{checkpoint}", "nothing is ever stopped here; is that meant?")
        default = rules[-1]
        if default.is_default and default.then.stops and len(rules) == 1:
            yield _hint("all-stop", default.place, "everything is stopped here; is that meant?", default.line)
        for rule in rules:
            yield from _rule(checkpoint, rule)


def _rule(checkpoint: str, rule: Rule) -> Iterator[Hint]:
    for condition in rule.when:
        sees = _SEES.get(checkpoint)
        if condition.quantity == "mode" and sees and not sees & {str(v) for v in condition.values}:
            text = f"{condition} never holds at {checkpoint}, where a reading sees {' or '.join(sorted(sees))}"
            yield _hint("never", rule.place, text, rule.line)
    asks = {c.quantity for c in rule.when}
    if checkpoint == "output" and "mode" not in asks and (need := next((q for q in asks if q[:6] == "needs."), None)):
        text = f"{need} is not known where a response alone is guarded, and on_error decides there; add mode: both"
        yield _hint("unknown-need", rule.place, text, rule.line)
    if rule.then not in PASSING and rule.message is None and rule.then in DEFAULT_MESSAGES and not rule.shadow:
        text = f"{rule.then} tells the caller only {DEFAULT_MESSAGES[rule.then]!r}; a message says what to do"
        yield _hint("no-message", rule.place, text, rule.line)


def _rest(policy: Policy) -> Iterator[Hint]:
    if policy.budget is not None:
        yield from _budget(policy, policy.budget)
    if not policy.examples:
        yield _hint("no-examples", "examples", "nothing says what it should decide; add some, and run policy test")


def _budget(policy: Policy, budget: Budget) -> Iterator[Hint]:
    if policy.lock is None:
        yield _hint("not-fitted", "budget", "nothing is fitted to it, so it cannot be used; run hhh-router policy fit")
    for part in budget.most:
        place = f"budget.{part}" if budget.together else "budget"
        try:
            i, _ = fitted_rule(policy, part)
        except PolicyError as error:
            text = error.message.removeprefix(f"{policy.source or policy.name}: ")
            yield _hint("nothing-to-fit", place, f"{text}; {error.hint}")
            continue
        if part == "weights" and budget.weight is not None:
            floor = policy.floors[i]
            if floor.raises[EXPERT] < budget.weight:
                text = f"raises {EXPERT} to {floor.raises[EXPERT]:g}, below the budget's {budget.weight:g}; raise more"
                yield _hint("short-floor", floor.place, text, floor.line)


def _hint(code: str, place: str, text: str, line: int | None = None) -> Hint:
    return Hint(code=code, place=place, line=line, text=text)
