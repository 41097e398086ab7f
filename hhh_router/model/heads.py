"""The heads: from pooled states of a few layers to raw scores for needs and outcomes.

Each view (prompt, response) is, per read layer, the mean state over the text's own tokens beside the state of its last
token. A missing view is replaced by a learned vector, and the mode is told by an embedding (HER2-style missing views;
modality dropout teaches all three modes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hhh_router.errors import BundleError, ReaderError
from hhh_router.types import Mode, Scores

MODES: tuple[Mode, ...] = get_args(Mode)
SUPPORT_DIMS = 64
"""Principal directions in which the distance from the training data is measured."""


@dataclass(slots=True)
class Views:
    """Pooled states of a batch."""

    prompt: Tensor
    """(B, V) float32, V = layers read x 2 x D; zeros where there is no prompt."""
    response: Tensor
    """(B, V) float32; zeros where there is no response."""
    modes: Sequence[Mode]


class Heads(nn.Module):
    """Scores needs and outcomes from a prompt view, a response view, or both."""

    def __init__(
        self, *, view: int, width: int, needs: Sequence[str], outcomes: Sequence[str], dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.needs = tuple(needs)
        self.outcomes = tuple(outcomes)
        self.view = view
        self.width = width
        for side in ("prompt", "response"):
            self.register_buffer(f"{side}_mean", torch.zeros(view))
            self.register_buffer(f"{side}_scale", torch.ones(view))
        self.project = nn.ModuleDict({side: nn.Linear(view, width) for side in ("prompt", "response")})
        self.missing = nn.ParameterDict({side: nn.Parameter(torch.zeros(width)) for side in ("prompt", "response")})
        self.mode = nn.Embedding(len(MODES), 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.mix = nn.Linear(2 * width, width)
        self.out = nn.Linear(width, len(self.needs) + len(self.outcomes))
        for mode, sides in (("prompt", 1), ("response", 1), ("both", 2)):
            self.register_buffer(f"support_{mode}_mean", torch.zeros(SUPPORT_DIMS * sides))
            self.register_buffer(f"support_{mode}_whiten", torch.eye(SUPPORT_DIMS * sides))
        for side in ("prompt", "response"):
            self.register_buffer(f"support_{side}_axes", torch.zeros(SUPPORT_DIMS, view))

    def forward(self, views: Views) -> Tensor:
        """Raw scores, needs then outcomes: (B, len(needs) + len(outcomes)), float32 logits."""
        modes = torch.tensor([MODES.index(m) for m in views.modes], device=views.prompt.device)
        sides = []
        for side, given in (("prompt", views.prompt), ("response", views.response)):
            projected = self.project[side](self.dropout(self.standardise(given, side)))
            absent = modes == MODES.index("response" if side == "prompt" else "prompt")
            sides.append(torch.where(absent[:, None], self.missing[side], projected))
        z = torch.cat(sides, dim=1) + self.mode(modes)  # (B, 2 width)
        hidden = nn.functional.gelu(self.mix(self.dropout(nn.functional.gelu(z))))
        return self.out(self.dropout(hidden))

    def standardise(self, view: Tensor, side: str) -> Tensor:
        """Zero mean and unit variance per coordinate, as measured in training; (B, V)."""
        scaled = (view - getattr(self, f"{side}_mean")) / getattr(self, f"{side}_scale")
        return scaled.clamp(-10, 10)  # a few coordinates of a residual stream are huge outliers

    def distances(self, views: Views) -> Tensor:
        """Mahalanobis distance from the training rows of the same mode, per root dimension: (B,)."""
        coordinates = {
            side: self.standardise(getattr(views, side), side) @ getattr(self, f"support_{side}_axes").T
            for side in ("prompt", "response")
        }
        coordinates["both"] = torch.cat([coordinates["prompt"], coordinates["response"]], dim=1)
        result = torch.empty(len(views.modes), device=views.prompt.device)
        for i, mode in enumerate(views.modes):
            centred = coordinates[mode][i] - getattr(self, f"support_{mode}_mean")
            whitened = getattr(self, f"support_{mode}_whiten") @ centred
            result[i] = whitened.norm() / whitened.numel() ** 0.5
        return result

    @torch.no_grad()
    def fit_support(self, views: Views) -> None:
        """Fit the axes and covariances behind `distances` on training rows; needs rows of all three modes."""
        modes = list(views.modes)
        for side in ("prompt", "response"):
            rows = [i for i, m in enumerate(modes) if m in (side, "both")]
            data = self.standardise(getattr(views, side)[rows], side)
            _, _, axes = torch.pca_lowrank(data, q=SUPPORT_DIMS, center=True)
            getattr(self, f"support_{side}_axes").copy_(axes.T)
        for mode in MODES:
            rows = [i for i, m in enumerate(modes) if m == mode]
            sides = ("prompt", "response") if mode == "both" else (mode,)
            data = torch.cat(
                [self.standardise(getattr(views, s)[rows], s) @ getattr(self, f"support_{s}_axes").T for s in sides],
                dim=1,
            )
            covariance = torch.cov(data.T)
            # a little shrinkage keeps the inverse tame when a mode has few rows
            covariance += 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance))
            getattr(self, f"support_{mode}_mean").copy_(data.mean(0))
            getattr(self, f"support_{mode}_whiten").copy_(torch.linalg.inv(torch.linalg.cholesky(covariance)))

    @torch.no_grad()
    def scores(self, views: Views, *, tokens: Sequence[int], layers_run: int) -> list[Scores]:
        """Raw scores of a batch, as plain data; mode ``response`` has no needs.

        Raises:
            ReaderError: A score is NaN or infinite; nothing may be concluded from it.
        """
        logits = self(views)
        # a need is the request's, so it is read from the prompt alone: a reply can neither raise nor lower it
        needs = self(Views(views.prompt, views.response, ["prompt"] * len(views.modes)))[:, : len(self.needs)]
        distances = self.distances(views)
        if not (torch.isfinite(logits).all() and torch.isfinite(distances).all()):
            raise ReaderError(
                "the router's heads gave NaN or infinite scores", hint="hhh-router bundle verify checks the weights"
            )
        results = []
        split = len(self.needs)
        for i, (mode, count) in enumerate(zip(views.modes, tokens, strict=True)):
            results.append(
                Scores(
                    mode=mode,
                    needs={} if mode == "response" else dict(zip(self.needs, needs[i].tolist(), strict=True)),
                    outcomes=dict(zip(self.outcomes, logits[i, split:].tolist(), strict=True)),
                    distance=float(distances[i]),
                    tokens=count,
                    layers_run=layers_run,
                )
            )
        return results

    def save(self, path: Path) -> None:
        """Write weights and shapes to one safetensors file."""
        metadata = {
            "needs": ",".join(self.needs),
            "outcomes": ",".join(self.outcomes),
            "view": str(self.view),
            "width": str(self.width),
        }
        state = {k: v.detach().float().contiguous() for k, v in self.state_dict().items()}
        save_file(state, path, metadata=metadata)

    @classmethod
    def load(cls, path: Path, *, view: int) -> Heads:
        """Read heads and check that they fit.

        Raises:
            BundleError: Missing, corrupt, NaN, or made for views of another size.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata: Mapping[str, Any] = file.metadata() or {}
            heads = cls(
                view=int(metadata["view"]),
                width=int(metadata["width"]),
                needs=metadata["needs"].split(","),
                outcomes=metadata["outcomes"].split(","),
            )
            heads.load_state_dict(load_file(path))
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise BundleError(
                f"{path}: cannot be read as heads ({error})", hint="restore the file, or train the router again"
            ) from error
        if heads.view != view:
            raise BundleError(
                f"{path}: made for views of {heads.view} numbers, this backbone and manifest give {view}",
                hint="heads belong to one backbone and one set of read_layers",
            )
        if not all(torch.isfinite(t).all() for t in heads.state_dict().values()):
            raise BundleError(f"{path}: holds NaN or infinity", hint="restore the file, or train the router again")
        return heads.eval().requires_grad_(False)
