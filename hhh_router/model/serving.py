"""Put a bundle's experts on its backbone as it is served: mixture, fused layers, int8 copies, packed weights."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from hhh_router.model.experts import Expert
from hhh_router.model.fused import fuse
from hhh_router.model.int8 import Phase, install_int8
from hhh_router.model.mixture import Gates, Skip, install_mixture
from hhh_router.model.packed import pack


def install_serving(
    model: PreTrainedModel, experts: Sequence[Expert], quantise: str, skip: Skip | None = None
) -> tuple[Gates, Phase]:
    """Change a loaded backbone in place for decoding under mixtures; it can do nothing else afterwards.

    Args:
        model: A ``…ForCausalLM`` model without adapters.
        experts: In ``DIMENSIONS`` order.
        quantise: ``none`` or ``int8``.
        skip: Experts that are not run; None runs all.

    Returns:
        What steers the mixture, and what says when int8 weights are used.

    Raises:
        BundleError: An expert is made for another backbone.
        SettingsError: Int8 weights cannot be used here.
    """
    gates = install_mixture(model, experts, skip)
    fuse(model, gates)
    phase = Phase() if quantise == "none" else install_int8(model)
    pack(model)
    return gates, phase
