"""The heads: from token states of a few layers to raw scores for needs and outcomes.

Each side (prompt, response) is pooled by learned attention: every token's states of all read layers become one small
vector, a set of learned queries weighs those vectors, and what each query gathered stands beside the last token's
vector. Attention pooling is linear in the number of tokens and needs each token once, so a reply can be pooled while
it is generated. A missing side is replaced by a learned vector, and the mode is told by an embedding (HER2-style
missing views; modality dropout teaches all three modes).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hhh_router.errors import BundleError, ReaderError
from hhh_router.types import Mode, Scores

Side = Literal["prompt", "response"]
SIDES: tuple[Side, ...] = get_args(Side)
MODES: tuple[Mode, ...] = get_args(Mode)
SUPPORT_DIMS = 64
"""Principal directions in which the distance from the training data is measured."""
_OUTLIER = 10.0  # a few coordinates of a residual stream are huge; in deviations
_SHAPES = ("layers", "dim", "width", "queries")


@dataclass(slots=True)
class Ragged:
    """Token states of one side of a batch, rows one after another without padding."""

    states: Tensor
    """(N, L, D): N tokens of all rows, L layers read, any float dtype."""
    lengths: Sequence[int]
    """Tokens of each row; 0 where the row has no such side. They sum to N."""


@dataclass(slots=True)
class Pooled:
    """One side of a batch, pooled."""

    features: Tensor
    """(B, W) float32: what the heads score."""
    summary: Tensor
    """(B, 2 D) float32: mean and last state of the topmost layer read, for the distance from the training data."""


@dataclass(slots=True)
class Views:
    """Pooled sides of a batch; rows of a side that is missing hold zeros."""

    prompt: Pooled
    response: Pooled
    modes: Sequence[Mode]

    def alone(self) -> Views:
        """The same rows with only their prompts in view."""
        return Views(self.prompt, self.response, ["prompt"] * len(self.modes))


class Heads(nn.Module):
    """Scores needs and outcomes from a prompt, a response, or both."""

    def __init__(
        self,
        *,
        layers: int,
        dim: int,
        width: int,
        queries: int,
        needs: Sequence[str],
        outcomes: Sequence[str],
        dropout: float = 0.0,
    ) -> None:
        """New heads with random weights.

        Args:
            layers: L, layers read.
            dim: D, width of the backbone's states.
            width: W, width of everything inside.
            queries: Q, learned queries per side.
            needs: Names of the need heads.
            outcomes: Names of the outcome heads.
            dropout: Of inputs and hidden units, in training.
        """
        super().__init__()
        self.needs, self.outcomes = tuple(needs), tuple(outcomes)
        self.layers, self.dim, self.width, self.queries = layers, dim, width, queries
        self.dropout = nn.Dropout(dropout)
        value = max(1, width // 3)
        self.embed = nn.ModuleDict({s: nn.Linear(layers * dim, width) for s in SIDES})
        self.refine = nn.ModuleDict({s: _residual(width, dropout) for s in SIDES})
        self.query = nn.ModuleDict({s: nn.Linear(width, queries, bias=False) for s in SIDES})
        self.value = nn.ModuleDict({s: nn.Linear(width, value) for s in SIDES})
        self.gather = nn.ModuleDict({s: nn.Linear(queries * value + width, width) for s in SIDES})
        self.missing = nn.ParameterDict({s: nn.Parameter(torch.zeros(width)) for s in SIDES})
        self.mode = nn.Embedding(len(MODES), 2 * width)
        self.mix = nn.Linear(2 * width, width)
        self.out = nn.Linear(width, len(self.needs) + len(self.outcomes))
        for side in SIDES:
            self.register_buffer(f"{side}_mean", torch.zeros(layers, dim))
            self.register_buffer(f"{side}_scale", torch.ones(layers, dim))
            self.register_buffer(f"support_{side}_centre", torch.zeros(2 * dim))
            self.register_buffer(f"support_{side}_scale", torch.ones(2 * dim))
            self.register_buffer(f"support_{side}_axes", torch.zeros(SUPPORT_DIMS, 2 * dim))
        for mode, sides in (("prompt", 1), ("response", 1), ("both", 2)):
            self.register_buffer(f"support_{mode}_mean", torch.zeros(SUPPORT_DIMS * sides))
            self.register_buffer(f"support_{mode}_whiten", torch.eye(SUPPORT_DIMS * sides))

    def tokens(self, states: Tensor, side: Side, lengths: Sequence[int] = ()) -> Tensor:
        """One vector per token, from its states of all read layers: (N, L, D) → (N, W), float32.

        ``lengths``, of the rows, matter in training alone: dropout there leaves out the same coordinates in all tokens
        of a row, which is also a small fraction of the random numbers.
        """
        scaled = (states - getattr(self, f"{side}_mean")).div_(getattr(self, f"{side}_scale"))
        flat = scaled.clamp_(-_OUTLIER, _OUTLIER).flatten(1)
        if self.training and lengths:
            kept = self.dropout(flat.new_ones(len(lengths), flat.shape[1]))
            flat = flat * kept.repeat_interleave(torch.tensor(lengths, device=flat.device), dim=0)
        embedded = nn.functional.gelu(self.embed[side](flat))
        return embedded + self.refine[side](embedded)

    def gathered(self, tokens: Tensor, lengths: Sequence[int], side: Side) -> Tensor:
        """What the queries gather from each row's tokens, and the last token: (N, W) → (B, W); zeros for empty rows."""
        rows = [i for i, n in enumerate(lengths) if n]
        result = tokens.new_zeros(len(lengths), self.width)
        if not rows:
            return result
        if len(lengths) == 1:  # a request alone, as most are: nothing to pad, so nothing to copy
            return self._joined(tokens[None], self.query[side](tokens)[None], tokens[-1:], side)
        last = torch.tensor([lengths[i] for i in rows], device=tokens.device)
        present = torch.arange(int(last.max()), device=tokens.device)[None] < last[:, None]  # (R, T)
        places = present.flatten().nonzero().squeeze(1)
        # one scatter: torch's pad_sequence writes a gradient as large as the batch for every row
        padded = tokens.new_zeros(present.numel(), self.width).index_copy(0, places, tokens)
        padded = padded.view(*present.shape, self.width)  # (R, T, W)
        scores = self.query[side](padded).masked_fill(~present[..., None], -torch.inf)  # (R, T, Q)
        final = padded[torch.arange(len(rows), device=tokens.device), last - 1]
        joined = self._joined(padded, scores, final, side)
        return result.index_copy(0, torch.tensor(rows, device=tokens.device), joined)

    def _joined(self, tokens: Tensor, scores: Tensor, final: Tensor, side: Side) -> Tensor:
        """(R, T, W) and scores (R, T, Q) and last tokens (R, W) → (R, W)."""
        found = scores.softmax(dim=1).transpose(1, 2) @ self.value[side](tokens)  # (R, Q, V)
        return self.gather[side](torch.cat([found.flatten(1), final], dim=1))  # type: ignore[no-any-return]

    def features(self, given: Ragged, side: Side) -> Tensor:
        """What the heads score of one side of a batch: (B, W)."""
        return self.gathered(self.tokens(given.states, side, given.lengths), given.lengths, side)

    def pool(self, given: Ragged, side: Side) -> Pooled:
        """Pool one side of a batch."""
        return Pooled(features=self.features(given, side), summary=summary(given))

    def forward(self, views: Views) -> Tensor:
        """Raw scores, needs then outcomes: (B, len(needs) + len(outcomes)), float32 logits."""
        modes = torch.tensor([MODES.index(m) for m in views.modes], device=views.prompt.features.device)
        sides = []
        for side, pooled in (("prompt", views.prompt), ("response", views.response)):
            absent = modes == MODES.index("response" if side == "prompt" else "prompt")
            sides.append(torch.where(absent[:, None], self.missing[side], pooled.features))
        z = nn.functional.gelu(torch.cat(sides, dim=1) + self.mode(modes))  # (B, 2 W)
        return self.out(self.dropout(nn.functional.gelu(self.mix(self.dropout(z)))))

    def distances(self, views: Views) -> Tensor:
        """Mahalanobis distance from the training rows of the same mode, per root dimension: (B,)."""
        summaries = {"prompt": views.prompt.summary, "response": views.response.summary}
        result = torch.empty(len(views.modes), device=views.prompt.summary.device)
        for mode in set(views.modes):
            rows = [i for i, m in enumerate(views.modes) if m == mode]
            sides = SIDES if mode == "both" else (mode,)
            found = torch.cat([self._coordinates(summaries[side][rows], side) for side in sides], dim=1)
            centred = found - getattr(self, f"support_{mode}_mean")
            whitened = centred @ getattr(self, f"support_{mode}_whiten").T
            result[rows] = whitened.norm(dim=1) / whitened.shape[1] ** 0.5
        return result

    def _coordinates(self, summaries: Tensor, side: str) -> Tensor:
        scaled = (summaries - getattr(self, f"support_{side}_centre")) / getattr(self, f"support_{side}_scale")
        return scaled.clamp(-_OUTLIER, _OUTLIER) @ getattr(self, f"support_{side}_axes").T

    @torch.no_grad()
    def fit_support(self, prompt: Tensor, response: Tensor, modes: Sequence[Mode]) -> None:
        """Fit the axes and covariances behind `distances` to the summaries of training rows of all three modes.

        Args:
            prompt: Summaries of the prompts, (n, 2 D); rows without one are not looked at.
            response: Likewise of the responses.
            modes: Of each row.
        """
        for side, data in (("prompt", prompt), ("response", response)):
            known = data[[i for i, m in enumerate(modes) if m in (side, "both")]]
            getattr(self, f"support_{side}_centre").copy_(known.mean(0))
            getattr(self, f"support_{side}_scale").copy_(known.std(0).clamp(min=1e-4))
            scaled = (known - known.mean(0)) / known.std(0).clamp(min=1e-4)
            _, _, axes = torch.pca_lowrank(scaled.clamp(-_OUTLIER, _OUTLIER), q=min(SUPPORT_DIMS, *scaled.shape))
            getattr(self, f"support_{side}_axes").zero_()[: axes.shape[1]].copy_(axes.T)
        for mode in MODES:
            rows = [i for i, m in enumerate(modes) if m == mode]
            sides = {"prompt": prompt, "response": response} if mode == "both" else None
            sides = sides or {mode: prompt if mode == "prompt" else response}
            data = torch.cat([self._coordinates(d[rows], s) for s, d in sides.items()], dim=1)
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
        alone = all(mode == "prompt" for mode in views.modes)
        needs = (logits if alone else self(views.alone()))[:, : len(self.needs)].tolist()
        found, distances = logits.tolist(), self.distances(views).tolist()
        if not all(map(math.isfinite, chain(distances, *found, *needs))):
            raise ReaderError(
                "the router's heads gave NaN or infinite scores", hint="hhh-router bundle verify checks the weights"
            )
        split = len(self.needs)
        return [
            Scores(
                mode=mode,
                needs={} if mode == "response" else dict(zip(self.needs, needs[i], strict=True)),
                outcomes=dict(zip(self.outcomes, found[i][split:], strict=True)),
                distance=distances[i],
                tokens=count,
                layers_run=layers_run,
            )
            for i, (mode, count) in enumerate(zip(views.modes, tokens, strict=True))
        ]

    def save(self, path: Path) -> None:
        """Write weights and shapes to one safetensors file."""
        metadata = {"needs": ",".join(self.needs), "outcomes": ",".join(self.outcomes)}
        metadata |= {name: str(getattr(self, name)) for name in _SHAPES}
        state = {k: v.detach().float().contiguous() for k, v in self.state_dict().items()}
        save_file(state, path, metadata=metadata)

    @classmethod
    def load(cls, path: Path, *, layers: int, dim: int) -> Heads:
        """Read heads and check that they fit.

        Args:
            path: ``heads.safetensors``.
            layers: Layers the manifest reads.
            dim: Width of the backbone's states.

        Raises:
            BundleError: Missing, corrupt, NaN, or made for states of another shape.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata: Mapping[str, Any] = file.metadata() or {}
            heads = cls(
                **{name: int(metadata[name]) for name in _SHAPES},
                needs=metadata["needs"].split(","),
                outcomes=metadata["outcomes"].split(","),
            )
            heads.load_state_dict(load_file(path))
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise BundleError(
                f"{path}: cannot be read as heads ({error})", hint="restore the file, or train the router again"
            ) from error
        if (heads.layers, heads.dim) != (layers, dim):
            raise BundleError(
                f"{path}: made for {heads.layers} layers of {heads.dim} numbers, this backbone and manifest give "
                f"{layers} of {dim}",
                hint="heads belong to one backbone and one set of read_layers",
            )
        if not all(torch.isfinite(t).all() for t in heads.state_dict().values()):
            raise BundleError(f"{path}: holds NaN or infinity", hint="restore the file, or train the router again")
        return heads.eval().requires_grad_(False)


def summary(given: Ragged) -> Tensor:
    """Mean and last state of the topmost layer read, per row: (B, 2 D) float32; zeros for rows without tokens."""
    topmost = given.states[:, -1]
    if len(given.lengths) == 1 and len(topmost):
        return torch.cat([topmost.float().mean(0), topmost[-1].float()])[None]
    width = given.states.shape[-1]
    result = torch.zeros(len(given.lengths), 2 * width, device=given.states.device)
    for row, part in enumerate(topmost.split(list(given.lengths))):
        if len(part):
            result[row] = torch.cat([part.float().mean(0), part[-1].float()])
    return result


def weights_sha256(path: Path) -> str:
    """Names the weights in a file of heads.

    Saved twice, the same heads are not the same file: safetensors orders its metadata at random.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def _residual(width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout))
