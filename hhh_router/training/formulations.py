"""Two published formulations of the router, trained on the same states with the same network, to compare ours with.

Both divide one softmax among the three experts, where ours asks per need whether it is there; so they know no base, and
a request that needs two experts has to be of one origin. Both are built as their papers mean them; what their releases
do otherwise is said where it matters.

- ``trinityx`` (Kashyap et al. 2025): shares ∝ γ · softmax(logits / T) with a fixed temperature T and fixed importance
  weights γ, and a term that keeps the mean shares from jumping between steps.
- ``h3fusion`` (Tekin et al. 2024): shares = softmax(logits), supervised by λ · cross-entropy with the origin. All three
  experts keep their share; the paper's mixture keeps the two largest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hhh_router.errors import DataError
from hhh_router.training.recipe import Formulation
from hhh_router.types import DIMENSIONS, EXPERTS, Dimension

PRECEDENCE: tuple[Dimension, ...] = ("harmless", "honest", "helpful")
"""Which dimension a row is taken to come from where it needs several: the rarer and graver first."""


def formulation_posterior(name: str, logits: Tensor, options: Formulation) -> Tensor:
    """What share of the mixture each expert gets under a formulation, shape (n, 4) as ``EXPERTS``, float64; base has 0.

    >>> two = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    >>> formulation_posterior("trinityx", two, Formulation(name="trinityx", temperature=2)).round(decimals=2).tolist()
    [[0.0, 0.21, 0.58, 0.21], [0.0, 0.33, 0.33, 0.33]]

    Args:
        name: ``trinityx`` or ``h3fusion``.
        logits: Of the needs in the order of ``DIMENSIONS``, uncalibrated, shape (n, 3).
        options: With which the heads were trained.

    Raises:
        ValueError: Logits of another shape, or a formulation whose posterior is not made from logits alone.
    """
    if logits.ndim != 2 or logits.shape[1] != len(DIMENSIONS):
        raise ValueError(f"logits have shape {tuple(logits.shape)}; expected (n, {len(DIMENSIONS)})")
    shares = _log_shares(name, logits.double(), options).exp()
    return torch.cat([shares.new_zeros(len(shares), len(EXPERTS) - len(DIMENSIONS)), shares], dim=1)


def origins(needs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The dimension that each row is taken to come from, and how much the row counts, both (n,).

    Args:
        needs: 1 where a row needs the dimension, in the order of ``DIMENSIONS``, shape (n, 3).
        weights: Of these labels; 0 where one is unknown, shape (n, 3).

    Returns:
        Places in ``DIMENSIONS``, and weights: 0 for a row that is not known to need anything.

    Raises:
        DataError: No row comes from some dimension.
    """
    place, weight = torch.zeros(len(needs), dtype=torch.long), torch.zeros(len(needs))
    for dimension in reversed(PRECEDENCE):  # what comes first is written last
        column = DIMENSIONS.index(dimension)
        found = (needs[:, column] == 1) & (weights[:, column] > 0)
        place[found], weight[found] = column, weights[found, column]
    counted = place[weight > 0].bincount(minlength=len(DIMENSIONS))
    if missing := [d for d, n in zip(DIMENSIONS, counted.tolist(), strict=True) if not n]:
        raise DataError(f"no row comes from {', '.join(missing)}", hint="add rows that need it and nothing graver")
    return place, weight


class GateLoss:
    """The loss of the three needs' logits in one pass over the rows.

    A new one is made for each pass, so that a killed run goes on to the same result.
    """

    def __init__(self, options: Formulation) -> None:
        self._options = options
        self._before: Tensor | None = None  # log of the mean shares of the last step

    def __call__(self, logits: Tensor, origin: Tensor, weights: Tensor) -> Tensor:
        """The loss of one step.

        Args:
            logits: Shape (B, 3).
            origin: Place of each row's origin in ``DIMENSIONS``, shape (B,).
            weights: How much each row counts, 0 for one without an origin, shape (B,).

        Returns:
            Weighted mean of −ln share of the origin, times λ or beside the smoothness term; 0 where no row counts.
        """
        counts = weights > 0
        if not counts.any():
            return logits.sum() * 0
        # once: the release's cross-entropy takes softmax of what is a softmax already, and counts padding as rows
        shares = _log_shares(self._options.name, logits[counts], self._options)
        each = nn.functional.nll_loss(shares, origin[counts], reduction="none")
        entropy = (each * weights[counts]).sum() / weights.sum().clamp(min=1.0)
        if self._options.name == "h3fusion":
            return self._options.gate_loss * entropy
        return entropy + self._options.smoothness * self._jump(shares)

    def _jump(self, shares: Tensor) -> Tensor:
        """KL(mean shares now ‖ mean shares of the step before), which is a constant; 0 in the first step.

        The release compares its first step with weights that do not sum to 1, which makes the term negative.
        """
        mean = shares.logsumexp(0) - torch.tensor(float(len(shares))).log()
        before, self._before = self._before, mean.detach()
        return mean.sum() * 0 if before is None else (mean.exp() * (mean - before)).sum()


def _log_shares(name: str, logits: Tensor, options: Formulation) -> Tensor:
    """ln of the three experts' shares, (n, 3) → (n, 3)."""
    if name == "trinityx":
        importance = logits.new_tensor([getattr(options.importance, d) for d in DIMENSIONS])
        return (logits / options.temperature + importance.log()).log_softmax(dim=1)
    if name == "h3fusion":
        return logits.log_softmax(dim=1)
    raise ValueError(f"formulation {name!r}: shares are made by a gate from calibrated needs, see routing.posterior")
