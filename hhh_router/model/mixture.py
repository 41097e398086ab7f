"""The exact mixture: ``y = W x + B_cat diag(g) A_cat x``, with ``g`` different for every row of a batch.

The experts' factors are concatenated once (rank 3r), so there are no merged copies and no cross terms, and a row's
weights are one small vector. A row whose weights are all on ``base`` gets ``g = 0``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hhh_router.errors import BundleError
from hhh_router.model.experts import Expert, block_of
from hhh_router.types import DIMENSIONS, Weights


@dataclass(frozen=True, slots=True)
class Skip:
    """Experts that are not run for rows which need them little: MoDES (Huang et al. 2025) with weights per request.

    The layers from ``first`` on are parted evenly into as many blocks as there are thresholds.
    """

    thresholds: tuple[float, ...]
    """Per block, lowest first: an expert whose weight is smaller does not act there, and nobody else gets its share."""
    first: int
    """l_r, the first adapted layer."""
    depth: int
    """Layers of the backbone."""

    def block(self, module: str) -> int:
        """The block of a module such as ``model.layers.16.mlp.up_proj``."""
        return block_of(module, len(self.thresholds), self.first, self.depth)


class Gates:
    """The weights in force, shared by every adapted layer. Only the model's own thread may set them."""

    def __init__(
        self, scales: Sequence[float], device: torch.device, dtype: torch.dtype, skip: Skip | None = None
    ) -> None:
        self._scales = torch.tensor(scales, device=device, dtype=torch.float32)  # (E,)
        self._dtype = dtype
        self.skip = skip
        self._blocks: list[Tensor | None] = [None]
        self._expanded: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def set(self, rows: Sequence[Weights] | None) -> None:
        """Set one weighting per row of the coming batch; None (or all rows on base) switches the adapters off."""
        self._expanded.clear()
        thresholds = self.skip.thresholds if self.skip else (0.0,)
        self._blocks = [None] * len(thresholds)  # the bare backbone, bit for bit: no adapter code runs at all
        if rows is None:
            return
        shares = torch.tensor([[w[d] for d in DIMENSIONS] for w in rows], dtype=torch.float32)
        for block, threshold in enumerate(thresholds):
            kept = shares * (shares >= threshold)
            if kept.any():
                self._blocks[block] = kept.to(self._scales.device) * self._scales  # (B, E)

    def active(self, block: int = 0) -> bool:
        """False where no row has an expert on in this block of layers."""
        return self._blocks[block] is not None

    def expand(self, ranks: tuple[int, ...], block: int = 0) -> Tensor:
        """Each row's weights repeated over the experts' ranks, one layer's after another's: (B, 1, sum of ranks)."""
        if (block, ranks) not in self._expanded:
            of = self._blocks[block]
            assert of is not None
            rows = of.repeat(1, len(ranks) // of.shape[1])
            repeats = torch.tensor(ranks, device=of.device)
            self._expanded[block, ranks] = rows.repeat_interleave(repeats, dim=1)[:, None].to(self._dtype)
        return self._expanded[block, ranks]


class SharedDown:
    """The first half of the update for linear layers that read the same input, such as q, k and v: one product for all.

    Their layers run one after the other on one tensor; the first of them works out what all of them need.
    """

    def __init__(self, gates: Gates, block: int = 0) -> None:
        self.gates = gates
        self.block = block
        """Of layers, in the gates' sense."""
        self._down: Tensor | None = None  # (sum of R, in)
        self._ranks: tuple[int, ...] = ()
        self._places: list[slice] = []
        self._input: Tensor | None = None
        self._found: tuple[Tensor, ...] = ()

    @property
    def factors(self) -> tuple[Tensor, tuple[int, ...]]:
        """First factors of all layers, (R, in), one layer's after another's, and the ranks in them."""
        assert self._down is not None
        return self._down, self._ranks

    @property
    def places(self) -> int:
        """Layers that share the product."""
        return len(self._places)

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
            h = nn.functional.linear(x, self._down) * self.gates.expand(self._ranks, self.block)
            self._input, self._found = x, tuple(h[..., p] for p in self._places)
        found = self._found[place]
        if place == len(self._places) - 1:  # the last one to ask: keep no activations alive
            self._input, self._found = None, ()
        return found


class MixtureLinear(nn.Module):
    """A frozen linear layer with the experts' updates on top."""

    def __init__(self, base: nn.Linear, up: Tensor, ranks: tuple[int, ...], shared: SharedDown, place: int) -> None:
        """A layer whose first factors ``shared`` has already.

        Args:
            base: The backbone's own layer.
            up: The experts' second factors side by side, (out, R).
            ranks: Of the experts in it.
            shared: Has the first factors,
            place: there.
        """
        super().__init__()
        self.base = base
        self.ranks = ranks
        self.shared = shared
        self._place = place
        self.register_buffer("up", up, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) → (B, T, out)."""
        y = self.base(x)
        if not self.shared.gates.active(self.shared.block):
            return y
        h = self.shared.gated(x, self._place)
        return y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), self.up.T).view(y.shape)


def mixed(base: nn.Linear, experts: Sequence[Expert], module: str, shared: SharedDown) -> MixtureLinear:
    """A layer of the backbone with the experts' factors for it.

    Raises:
        BundleError: They are of another size.
    """
    parts = [e.factors.get(module) for e in experts]
    ranks = tuple(0 if p is None else p.down.shape[0] for p in parts)
    place = {"device": base.weight.device, "dtype": base.weight.dtype}
    kept = [p for p in parts if p is not None]
    for part in kept:
        if (part.up.shape[0], part.down.shape[1]) != tuple(base.weight.shape):
            raise BundleError(
                f"adapter for {module} is {part.up.shape[0]}x{part.down.shape[1]}, the backbone's layer is "
                f"{'x'.join(map(str, base.weight.shape))}",
                hint="the bundle was trained on another backbone",
            )
    number = shared.add(torch.cat([p.down for p in kept]).to(**place), ranks)
    return MixtureLinear(base, torch.cat([p.up for p in kept], dim=1).to(**place), ranks, shared, number)


class FoldedMixture(nn.Module):
    """A mixture whose first factors are further outputs of the backbone's layer, so that one product makes both."""

    def __init__(self, layer: MixtureLinear) -> None:
        """Take a layer's place; it must not share its first factors with others, nor be called again."""
        super().__init__()
        down, self._ranks = layer.shared.factors
        self._gates, self._block, self._out = layer.shared.gates, layer.shared.block, layer.base.out_features
        bias = None if layer.base.bias is None else nn.functional.pad(layer.base.bias, (0, down.shape[0]))
        self.both = linear(torch.cat([layer.base.weight, down]), bias)
        self.up = linear(layer.up)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) → (B, T, out), a tensor of its own or, where no expert is on, a view of one."""
        both = self.both(x)
        y = both[..., : self._out]
        if not self._gates.active(self._block):
            return y
        return self.up(both[..., self._out :] * self._gates.expand(self._ranks, self._block)).add_(y)


def fold(layer: nn.Module) -> nn.Module:
    """A mixture with its first factors in the backbone's layer, where they are its own; anything else as it is."""
    return FoldedMixture(layer) if isinstance(layer, MixtureLinear) and layer.shared.places == 1 else layer


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A frozen layer of given weights, (out, in)."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


def joined(layers: Sequence[nn.Module], gates: Gates) -> nn.Module:
    """Layers that read the same input as one, whose output is theirs side by side.

    Args:
        layers: Each an ``nn.Linear`` or a `MixtureLinear` on one. None of them may be called again.
        gates: Steer those that are mixtures.
    """
    bases = [layer.base if isinstance(layer, MixtureLinear) else layer for layer in layers]
    weight, bias = torch.cat([b.weight for b in bases]), None
    if any(b.bias is not None for b in bases):
        bias = torch.cat([weight.new_zeros(b.out_features) if b.bias is None else b.bias for b in bases])
    base = linear(weight, bias)
    mixtures = [layer for layer in layers if isinstance(layer, MixtureLinear)]
    if not mixtures:
        return base
    ups = [
        layer.up if isinstance(layer, MixtureLinear) else weight.new_zeros(b.out_features, 0)
        for layer, b in zip(layers, bases, strict=True)
    ]
    shared = SharedDown(gates, mixtures[0].shared.block)
    down, ranks = mixtures[0].shared.factors  # of all of them, in this order
    return MixtureLinear(base, torch.block_diag(*ups), ranks, shared, shared.add(down, ranks))


def install_mixture(model: nn.Module, experts: Sequence[Expert], skip: Skip | None = None) -> Gates:
    """Put the experts into a model's linear layers, in place, and return the gates that steer them.

    Args:
        model: Without adapters.
        experts: In ``DIMENSIONS`` order.
        skip: Which of them are not run where; None runs each that has any weight.

    Raises:
        BundleError: An expert adapts a layer the model does not have, or of another size.
    """
    reference = next(model.parameters())
    gates = Gates([e.scale for e in experts], reference.device, reference.dtype, skip)
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
        shared = groups.setdefault((parent, together), SharedDown(gates, skip.block(module) if skip else 0))
        setattr(model.get_submodule(parent), name, mixed(base, experts, module, shared))
    return gates


_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers of one block that every supported family calls on the same tensor, in this order."""


def _as_called(module: str) -> tuple[str, int]:
    parent, _, name = module.rpartition(".")
    return parent, next((names.index(name) for names in _SAME_INPUT if name in names), 0)
