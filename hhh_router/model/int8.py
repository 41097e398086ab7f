"""Int8 copies of a backbone's linear layers, for decode steps of few rows: those wait for weights to be read.

Weights alone are rounded, symmetrically and with one scale per output channel. Activations stay as they are: rounded
too, they broke the default model. The copies stand below the mixture (`hhh_router.model.mixture`): the experts' second
factors are never rounded, the first ones where they are outputs of the layer's own product.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hhh_router.errors import SettingsError
from hhh_router.model.mixture import FoldedMixture

MOST_ROWS = {"float32": 8, "bfloat16": 4}
"""Most rows of a step that are multiplied with int8 weights, by the precision the backbone runs in.

Whole decode steps of SmolLM2-135M under mixtures, torch 2.13. float32, 1 thread of an AVX2 CPU (EPYC 7003) with other
work on it: 1.1 times as fast at 1 row, 1.4 at 2 and 4, 1.1 at 8, 0.9 at 16. bfloat16 beside packed weights
(`hhh_router.model.packed`), 2 threads of a CPU with AMX: 1.18 times at 1 row, 1.13 at 2, 1.04 at 4, 0.81 at 8."""
_LARGEST = 127
_PRODUCT = torch.bfloat16
"""What the product takes and gives. torch 2.13's kernel for float32 activations is not vectorised on x86: 3 times as
slow as the float32 layer itself at 1 row, 20 times at 16."""
_ALIGNED = 32  # the kernel reads inputs in whole vectors, and past the end of a row where they do not fit


class Phase:
    """Whether a decode step is under way, shared by all int8 layers. Only the model's own thread may set it.

    Calibrators were fitted to readings through the base weights. A short prompt has as few rows as a decode step, so
    size alone must not choose: prompts and guarded texts are read with the base weights, however short they are.
    """

    def __init__(self, most_rows: int = 0) -> None:
        """A phase for layers that take up to ``most_rows`` rows; without layers it changes nothing."""
        self._most_rows = most_rows
        self.rows = 0
        """A pass of at most so many rows takes the int8 weights; 0 outside decode steps."""
        self.added_bytes = 0
        """What the int8 copies take beside the base weights."""

    @property
    def quantised(self) -> bool:
        """True where a decode step may differ from what the base weights would give."""
        return self.added_bytes > 0

    @contextmanager
    def decoding(self, *, any_rows: bool = False) -> Iterator[None]:
        """Let the passes in the block take the int8 weights.

        Args:
            any_rows: However many rows they have: a row comes out the same, so many steps can be measured at once.
        """
        self.rows = sys.maxsize if any_rows else self._most_rows
        try:
            yield
        finally:
            self.rows = 0


class Int8Linear(nn.Module):
    """A frozen linear layer with an int8 copy of its weights."""

    def __init__(self, base: nn.Linear, phase: Phase) -> None:
        super().__init__()
        self.base = base
        self._phase = phase
        weight = base.weight.detach().float()  # (out, in)
        # the scale is rounded first, so that its own rounding adds no error
        scales = (weight.abs().amax(dim=1) / _LARGEST).clamp(min=torch.finfo(_PRODUCT).tiny).to(_PRODUCT)
        rounded = (weight / scales.float()[:, None]).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
        self.register_buffer("rounded", rounded, persistent=False)  # (out, in)
        self.register_buffer("scales", scales, persistent=False)  # (out,)

    @property
    def added_bytes(self) -> int:
        """Of the copy."""
        return int(self.rounded.nbytes + self.scales.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out), a tensor of its own: the mixture adds to it in place."""
        size = x.shape[-1]
        if x.numel() > self._phase.rows * size:
            return self.base(x)
        flat = x.reshape(-1, size).to(_PRODUCT)
        y = torch.ops.aten._weight_int8pack_mm(flat, self.rounded, self.scales).to(x.dtype)
        if self.base.bias is not None:
            y += self.base.bias
        return y.view(*x.shape[:-1], y.shape[-1])


def check_int8(device: str, dtype: str) -> None:
    """Stop where int8 weights cannot be used.

    Args:
        device: torch device.
        dtype: Precision of the backbone, such as ``float32``.

    Raises:
        SettingsError: No CPU, a precision without a kernel, or a torch without it.
    """
    if torch.device(device).type != "cpu":
        raise SettingsError(
            f"HHH_ROUTER_QUANTISE=int8 runs on CPUs only, HHH_ROUTER_DEVICE is {device}",
            hint="set HHH_ROUTER_QUANTISE=none, or HHH_ROUTER_DEVICE=cpu",
        )
    if dtype not in MOST_ROWS:
        raise SettingsError(
            f"HHH_ROUTER_QUANTISE=int8 goes with {' and '.join(MOST_ROWS)}, the backbone runs in {dtype}",
            hint="set HHH_ROUTER_DTYPE=auto, or HHH_ROUTER_QUANTISE=none",
        )
    try:
        given = torch.ones(1, _ALIGNED, dtype=_PRODUCT)
        weights, scales = torch.ones(1, _ALIGNED, dtype=torch.int8), torch.ones(1, dtype=_PRODUCT)
        found = float(torch.ops.aten._weight_int8pack_mm(given, weights, scales))
    except (AttributeError, RuntimeError) as error:
        raise SettingsError(
            f"torch {torch.__version__} has no int8 product here ({error})",
            hint="set HHH_ROUTER_QUANTISE=none, or install the torch that constraints.txt names",
        ) from error
    if found != _ALIGNED:
        raise SettingsError(
            f"torch {torch.__version__}'s int8 product is wrong here: {found:g} in place of {_ALIGNED}",
            hint="set HHH_ROUTER_QUANTISE=none",
        )


def install_int8(model: nn.Module) -> Phase:
    """Give a model's linear layers, the output head included, int8 copies, in place; returns what switches them.

    After `install_mixture`, whose layers keep theirs inside. Embeddings stay as they are, also where the head is tied
    to them, and so does a layer whose input does not fit the kernel.

    Raises:
        SettingsError: See `check_int8`.
    """
    reference = next(model.parameters())
    dtype = str(reference.dtype).removeprefix("torch.")
    check_int8(str(reference.device), dtype)
    phase = Phase(MOST_ROWS[dtype])
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or layer.in_features % _ALIGNED:
            continue
        parent, _, child = name.rpartition(".")
        if isinstance(model.get_submodule(parent), FoldedMixture) and child == "up":
            continue  # small, and what it reads has been multiplied with rounded weights already
        made = Int8Linear(layer, phase)
        phase.added_bytes += made.added_bytes
        setattr(model.get_submodule(parent), child, made)
    return phase
