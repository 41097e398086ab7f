"""The exact mixture: ``y = W x + B_cat diag(g) A_cat x``, with ``g`` different for every row of a batch.

The experts' factors are concatenated once (rank 3r), so there are no merged copies and no cross terms, and a row's
weights are one small vector. A row whose weights are all on ``base`` gets ``g = 0``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hhh_router.errors import BundleError
from hhh_router.model.experts import Expert
from hhh_router.types import DIMENSIONS, Weights


class Gates:
    """The weights in force, shared by every adapted layer. Only the model's own thread may set them."""

    def __init__(self, scales: Sequence[float], device: torch.device, dtype: torch.dtype) -> None:
        self._scales = torch.tensor(scales, device=device, dtype=torch.float32)  # (E,)
        self._dtype = dtype
        self._rows: Tensor | None = None
        self._expanded: dict[tuple[int, ...], Tensor] = {}

    def set(self, rows: Sequence[Weights] | None) -> None:
        """Set one weighting per row of the coming batch; None (or all rows on base) switches the adapters off."""
        self._expanded.clear()
        if rows is None or all(w.base == 1.0 for w in rows):
            self._rows = None  # the bare backbone, bit for bit: no adapter code runs at all
            return
        shares = torch.tensor([[w[d] for d in DIMENSIONS] for w in rows], dtype=torch.float32)
        self._rows = shares.to(self._scales.device) * self._scales  # (B, E)

    @property
    def active(self) -> bool:
        """False when the bare backbone runs."""
        return self._rows is not None

    def expand(self, ranks: tuple[int, ...]) -> Tensor:
        """Each row's weights repeated over the experts' ranks, one layer's after another's: (B, 1, sum of ranks)."""
        if ranks not in self._expanded:
            assert self._rows is not None
            rows = self._rows.repeat(1, len(ranks) // self._rows.shape[1])
            repeats = torch.tensor(ranks, device=self._rows.device)
            self._expanded[ranks] = rows.repeat_interleave(repeats, dim=1)[:, None].to(self._dtype)
        return self._expanded[ranks]


class SharedDown:
    """The first half of the update for linear layers that read the same input, such as q, k and v: one product for all.

    Their layers run one after the other on one tensor; the first of them works out what all of them need.
    """

    def __init__(self, gates: Gates) -> None:
        self._gates = gates
        self._down: Tensor | None = None  # (sum of R, in)
        self._ranks: tuple[int, ...] = ()
        self._places: list[slice] = []
        self._input: Tensor | None = None
        self._found: tuple[Tensor, ...] = ()

    def add(self, down: Tensor, ranks: tuple[int, ...]) -> int:
        """Take a layer's factors, (R, in), with the experts' ranks in it; returns the layer's place."""
        start = sum(self._ranks)
        self._down = down if self._down is None else torch.cat([self._down, down])
        self._ranks += ranks
        self._places.append(slice(start, start + sum(ranks)))
        return len(self._places) - 1

    def gated(self, x: Tensor, place: int) -> Tensor:
        """A layer's gated low-rank states: (B, T, in) → (B, T, R)."""
        if self._input is not x:
            h = nn.functional.linear(x, self._down) * self._gates.expand(self._ranks)
            self._input, self._found = x, tuple(h[..., p] for p in self._places)
        found = self._found[place]
        if place == len(self._places) - 1:  # the last one to ask: keep no activations alive
            self._input, self._found = None, ()
        return found


class MixtureLinear(nn.Module):
    """A frozen linear layer with the experts' updates on top."""

    def __init__(
        self, base: nn.Linear, experts: Sequence[Expert], module: str, gates: Gates, shared: SharedDown
    ) -> None:
        super().__init__()
        self.base = base
        self.gates = gates
        parts = [e.factors.get(module) for e in experts]
        self.ranks = tuple(0 if p is None else p.down.shape[0] for p in parts)
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        kept = [p for p in parts if p is not None]
        for part in kept:
            if (part.up.shape[0], part.down.shape[1]) != tuple(base.weight.shape):
                raise BundleError(
                    f"adapter for {module} is {part.up.shape[0]}x{part.down.shape[1]}, the backbone's layer is "
                    f"{'x'.join(map(str, base.weight.shape))}",
                    hint="the bundle was trained on another backbone",
                )
        self._shared = shared
        self._place = shared.add(torch.cat([p.down for p in kept]).to(**place), self.ranks)
        self.register_buffer("up", torch.cat([p.up for p in kept], dim=1).to(**place), persistent=False)  # (out, R)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) → (B, T, out)."""
        y = self.base(x)
        if not self.gates.active:
            return y
        h = self._shared.gated(x, self._place)
        return y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), self.up.T).view(y.shape)


def install_mixture(model: nn.Module, experts: Sequence[Expert]) -> Gates:
    """Put the experts into a model's linear layers, in place, and return the gates that steer them.

    Raises:
        BundleError: An expert adapts a layer the model does not have, or of another size.
    """
    reference = next(model.parameters())
    gates = Gates([e.scale for e in experts], reference.device, reference.dtype)
    groups: dict[tuple[str, int | str], SharedDown] = {}
    for module in sorted({m for e in experts for m in e.factors}, key=_as_called):
        try:
            base = model.get_submodule(module)
        except AttributeError as error:
            raise BundleError(
                f"the backbone has no layer {module}", hint="the bundle was trained on another backbone"
            ) from error
        if not isinstance(base, nn.Linear):
            raise BundleError(f"{module} is a {type(base).__name__}, not a linear layer; it cannot be adapted")
        parent, _, name = module.rpartition(".")
        together = next((i for i, names in enumerate(_SAME_INPUT) if name in names), name)
        shared = groups.setdefault((parent, together), SharedDown(gates))
        setattr(model.get_submodule(parent), name, MixtureLinear(base, experts, module, gates, shared))
    return gates


_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers of one block that every supported family calls on the same tensor, in this order."""


def _as_called(module: str) -> tuple[str, int]:
    parent, _, name = module.rpartition(".")
    return parent, next((names.index(name) for names in _SAME_INPUT if name in names), 0)
