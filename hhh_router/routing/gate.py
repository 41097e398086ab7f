"""Needs → posterior over the four experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from hhh_router.types import DIMENSIONS, EXPERTS, Posterior

MAX_LOGIT = 6.0  # METHOD §7.2: in the odds gate no need moves the posterior's odds by more than e^6, about 400

_NO_PARAMS: Mapping[str, float] = {}


def posterior(needs: Mapping[str, float], gate: str = "odds", params: Mapping[str, float] | None = None) -> Posterior:
    """What the router believes each expert should contribute.

    Args:
        needs: P(the request needs d) per dimension, calibrated, each in [0, 1]; other keys are left aside.
        gate: How they become shares; a key of ``GATES``.
        params: The gate's parameters, by the names in ``GATE_PARAMETERS``; none for ``odds``.

    >>> posterior({"helpful": 0.5, "harmless": 0.5, "honest": 0.5}).base
    0.25

    Raises:
        ValueError: A need is no probability, or is missing; no such gate; or parameters that are not this gate's.
    """
    if gate not in GATES:
        raise ValueError(f"gate {gate!r} is not known; use {', '.join(GATES)}")
    for d in DIMENSIONS:
        if not (d in needs and 0 <= needs[d] <= 1):  # also false for NaN
            raise ValueError(f"needs.{d}: {needs.get(d)} is no probability")
    given = _NO_PARAMS if params is None else params
    _check_params(gate, given)
    return GATES[gate](needs, given)


def odds(needs: Mapping[str, float], params: Mapping[str, float] = _NO_PARAMS) -> Posterior:
    """Shares in proportion to the odds of each need, with 1 for base: nothing at stake → base.

    Source: METHOD §7.2.
    """
    shares = {d: math.exp(_clipped_logit(needs[d])) for d in DIMENSIONS}
    total = 1.0 + math.fsum(shares.values())
    return Posterior.from_mapping({"base": 1.0 / total} | {d: s / total for d, s in shares.items()})


def softmax_ts(needs: Mapping[str, float], params: Mapping[str, float]) -> Posterior:
    """Softmax of the needs' logits and 0 for base, divided by ``temperature``: above 1 evens the shares out.

    With temperature 1 it is `odds`.

    >>> even = softmax_ts({"helpful": 0.9, "harmless": 0.1, "honest": 0.5}, {"temperature": 1e6})
    >>> round(even.helpful, 4), round(even.harmless, 4)
    (0.25, 0.25)

    Source: temperature scaling, Guo et al. 2017, section 4.2.
    """
    logits = {"base": 0.0} | {d: _clipped_logit(needs[d]) for d in DIMENSIONS}
    return _softmax({e: x / params["temperature"] for e, x in logits.items()})


def dirichlet(needs: Mapping[str, float], params: Mapping[str, float]) -> Posterior:
    """Softmax of W·ln p + b, with p the posterior of `odds`: each expert's share may answer to every other one's.

    Entry ``harmless.honest`` is the weight of ln p_honest in the logit of harmless, ``harmless.bias`` its intercept.
    With the identity for W and b = 0 it is `odds`.

    Source: Kull et al. 2019, the linear parametrisation of their calibration maps.
    """
    logs = {e: math.log(p) for e, p in odds(needs).as_dict().items()}
    return _softmax(
        {e: params[f"{e}.bias"] + math.fsum(params[f"{e}.{of}"] * logs[of] for of in EXPERTS) for e in EXPERTS}
    )


def _softmax(logits: Mapping[str, float]) -> Posterior:
    if not all(math.isfinite(x) for x in logits.values()):
        raise ValueError(f"the gate's parameters make logits that are not finite: {dict(logits)}")
    top = max(logits.values())
    shares = {e: math.exp(x - top) for e, x in logits.items()}  # the largest is 1, so none overflows
    total = math.fsum(shares.values())
    return Posterior.from_mapping({e: s / total for e, s in shares.items()})


def _check_params(gate: str, params: Mapping[str, float]) -> None:
    expected = GATE_PARAMETERS[gate]
    if missing := [name for name in expected if name not in params]:
        raise ValueError(f"gate {gate!r} needs {', '.join(expected)}; {missing[0]!r} is not given")
    if unknown := sorted(set(params) - set(expected)):
        raise ValueError(f"gate {gate!r} has no parameter {unknown[0]!r}; it has {', '.join(expected) or 'none'}")
    if wrong := [name for name in expected if not math.isfinite(params[name])]:
        raise ValueError(f"gate {gate!r}: {wrong[0]} must be finite, found {params[wrong[0]]}")
    if params.get("temperature", 1.0) <= 0:
        raise ValueError(f"gate {gate!r}: temperature must be > 0, found {params['temperature']}")


def _clipped_logit(probability: float) -> float:
    if probability <= 0 or probability >= 1:
        return MAX_LOGIT if probability >= 1 else -MAX_LOGIT
    return min(MAX_LOGIT, max(-MAX_LOGIT, math.log(probability / (1 - probability))))


GATES: Mapping[str, Callable[[Mapping[str, float], Mapping[str, float]], Posterior]] = {
    "odds": odds,
    "softmax_ts": softmax_ts,
    "dirichlet": dirichlet,
}
"""Ways to turn needs and parameters into shares, by name, from the fewest parameters (0, 1, 20) to the most."""

GATE_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "odds": (),
    "softmax_ts": ("temperature",),
    "dirichlet": tuple(f"{e}.{of}" for e in EXPERTS for of in (*EXPERTS, "bias")),
}
"""The names of each gate's parameters."""
