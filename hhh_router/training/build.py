"""The stages that make a bundle: experts, router, calibration. Each writes into the bundle's folder and can be resumed.

Work in progress (checkpoints, token states) lives in a work folder beside it; what users get is the bundle alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from hhh_router.bundle import (
    MANIFEST,
    Bundle,
    CalibratorsSpec,
    DataSpec,
    ExpertSpec,
    HeadsSpec,
    Manifest,
    file_sha256,
    write_manifest,
)
from hhh_router.data.examples import Example, drop_overlap, prompt_hash
from hhh_router.errors import BundleError, DataError
from hhh_router.model.base import Backbone, compute_dtype, load_backbone
from hhh_router.model.experts import load_expert
from hhh_router.model.fetch import fetch_backbone
from hhh_router.model.heads import Heads
from hhh_router.model.reader import HeadReader
from hhh_router.model.runner import Reply
from hhh_router.training.blocks import Trial, read_blocks, search_blocks, write_trials
from hhh_router.training.experts import Progress, train_expert
from hhh_router.training.features import response_only, states_folder, token_states
from hhh_router.training.lessons import Lesson, lesson_rows, lessons
from hhh_router.training.mix import check_licences, draw, provenance
from hhh_router.training.processes import join, place, refuse_several
from hhh_router.training.recipe import Formulation, Recipe, Share
from hhh_router.training.router import Epoch, train_heads
from hhh_router.types import DIMENSIONS, NEEDS, OUTCOMES

SEEN = "trained_prompts.json"
HEADS = "heads.safetensors"
FORMULATION = "formulation.json"


class FormulationHeads(BaseModel):
    """``formulation.json``: what the heads beside it were trained to say, for formulations that are only compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    formulation: Formulation
    """With the options that turn logits into shares, see `formulations.formulation_posterior`."""
    heads_sha256: str
    read_layers: tuple[int, ...]
    backbone_sha256: str | None
    """Of the recipe's backbone."""
    recipe: str
    recipe_sha256: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """What every stage needs."""

    recipe: Recipe
    recipe_file: str
    recipe_sha256: str
    data: Path
    """Folder of data sets."""
    bundle: Path
    """Folder of the bundle that is made."""
    work: Path
    """Folder for checkpoints."""
    cache_dir: Path
    threads: int
    device: str = "cpu"
    on_progress: Callable[[str, int, int, str], None] = field(default=lambda stage, done, total, note: None)
    """Told the stage, how far it is, and a note such as the loss."""

    def backbone(self, dtype: str | None = None) -> Backbone:
        """Fetch and load the recipe's backbone, in ``dtype`` or in the precision that is fastest here."""
        torch.set_num_threads(self.threads)
        folder = fetch_backbone(self.recipe.backbone, self.cache_dir, root=self.bundle)
        chosen = dtype or compute_dtype(self.recipe.backbone, self.device)
        return load_backbone(folder, self.recipe.backbone, device=place(self.device), dtype=chosen)

    @property
    def states(self) -> Path:
        """Folder of token states, shared by all recipes on this backbone."""
        return states_folder(self.work.parent, self.recipe.backbone)


def train_experts(shop: Workshop, only: Sequence[str] = DIMENSIONS) -> None:
    """Train the experts that are not there yet, and write the manifest with their hashes.

    Several processes (see `training.processes`) share the batches; all see the same bundle and work folders.

    Raises:
        DataError, TrainingDiverged: See `training.mix` and `training.experts`.
    """
    check_licences(shop.recipe)
    together = join(shop.device)
    if not together.is_main:
        shop = replace(shop, on_progress=lambda *_: None)
    backbone = shop.backbone()
    plan = shop.recipe.experts
    for dimension in only:
        target = shop.bundle / "experts" / dimension
        if (target / "adapter_model.safetensors").is_file():
            shop.on_progress(f"expert {dimension}", 1, 1, "already trained")
            continue
        work = shop.work / "experts" / dimension
        with together.main_first():  # it has the backbone write the replies that are asked for; the others read them
            rows = lessons(
                plan.mixes[dimension], plan, backbone, shop.data, seed=shop.recipe.seed, folder=shop.work / "experts",
                on_rows=told(shop, f"replies for {dimension}"),
            )  # fmt: skip
        for step in train_expert(dimension, rows, backbone, shop.recipe, work, together=together):
            shop.on_progress(f"expert {dimension}", step.step, step.steps, _note(step))
        if together.is_main:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(work / "expert", target, dirs_exist_ok=True)
            _scales(shop, dimension).unlink(missing_ok=True)  # of the expert that was there before
    if together.is_main:
        _write(shop, heads=_kept_heads(shop), calibrators=None)


def search_scales(shop: Workshop, only: Sequence[str] = DIMENSIONS) -> dict[str, Trial]:
    """Search per-block scales of trained experts and write them into the manifest; the chosen setting of each.

    Raises:
        BundleError: The experts are not there yet.
        DataError: The recipe has no ``experts.blocks``, or a share has no rows.
    """
    recipe, plan = shop.recipe, shop.recipe.experts
    if plan.blocks is None:
        raise DataError("the recipe has no experts.blocks", hint="recipes/smollm2-135m.yaml shows the form")
    refuse_several("train scales")
    check_licences(recipe)
    _need_experts(shop)
    backbone = shop.backbone()
    chosen: dict[str, Trial] = {}
    for dimension in (d for d in only if d in plan.blocks.pairs):
        pairs, benign = scale_rows(shop, dimension, backbone)
        expert = load_expert(shop.bundle / "experts" / dimension, dimension)
        trials: list[Trial] = []
        for trial in search_blocks(
            expert, backbone, pairs, benign, plan.blocks, first=recipe.first_adapted_layer, beta=plan.beta
        ):
            trials.append(trial)
            shop.on_progress(f"scales of {dimension}", len(trials), len(trials), f"objective {trial.objective:.3f}")
        chosen[dimension] = trials[-1]
        write_trials(_scales(shop, dimension), trials)
    _write(shop, heads=_kept_heads(shop), calibrators=None)
    return chosen


def scale_rows(shop: Workshop, dimension: str, backbone: Backbone) -> tuple[list[Lesson], list[Reply]]:
    """Pairs that judge an expert, and the backbone's own replies to benign prompts, by ``experts.blocks``.

    Raises:
        DataError: The recipe has none for this expert.
    """
    recipe, plan = shop.recipe, shop.recipe.experts
    if plan.blocks is None or dimension not in plan.blocks.pairs:
        raise DataError(
            f"the recipe has no experts.blocks.pairs.{dimension}", hint="recipes/smollm2-135m.yaml shows the form"
        )
    pairs, benign = (
        lessons(
            shares, plan, backbone, shop.data, seed=recipe.seed, folder=shop.work / "experts",
            on_rows=told(shop, f"replies to judge {dimension}"),
        )
        for shares in (plan.blocks.pairs[dimension], plan.blocks.benign)
    )  # fmt: skip
    return pairs, [b.good for b in benign]


def _scales(shop: Workshop, dimension: str) -> Path:
    """Where the search of one expert's scales is kept: in the bundle, since who reads them may ask what was tried."""
    return shop.bundle / "experts" / dimension / "blocks.tsv"


def train_router(shop: Workshop) -> list[float]:
    """Train the heads on token states and write them into the bundle; the loss per epoch.

    A formulation other than ours is trained to be compared, not served: its heads need no experts, and stand alone in
    their folder beside ``formulation.json``, which says how to read them. No manifest is written.

    Raises:
        BundleError: The experts are not there yet, or a formulation's heads would replace those of a bundle.
    """
    refuse_several("train router")
    check_licences(shop.recipe)
    plan = shop.recipe.router
    served = plan.formulation.is_ours
    if served:
        _need_experts(shop)
    else:
        _keep_apart(shop)
    examples = router_examples(shop)
    reader, backbone = _bare_reader(shop)
    done = 0

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        shop.on_progress("reading", done, len(examples), f"{len(examples)} texts")

    states = token_states(
        [e.read() for e in examples], reader, backbone.encoder,
        max_tokens=plan.max_tokens, folder=shop.states, on_rows=count,
    )  # fmt: skip
    losses: list[float] = []
    for event in train_heads(examples, states, plan, shop.recipe.seed, folder=shop.work / "heads", device=shop.device):
        if isinstance(event, Epoch):
            losses.append(event.loss)
            shop.on_progress("heads", event.number, event.epochs, f"loss {event.loss:.4f}")
        else:
            shop.bundle.mkdir(parents=True, exist_ok=True)
            event.save(shop.bundle / HEADS)
    seen = sorted({prompt_hash(e) for e in examples if e.messages})
    (shop.work / SEEN).write_text(json.dumps(seen), encoding="utf-8")
    if served:
        _write(shop, heads=_heads_spec(shop), calibrators=None)
    else:
        _write_formulation(shop)
    return losses


def router_examples(shop: Workshop) -> list[Example]:
    """The router's training rows, with a share of responses also read alone."""
    recipe = shop.recipe
    examples = draw(recipe.router.mix, shop.data, seed=recipe.seed)
    return examples + response_only([e for e in examples if e.outcomes and _read_alone(e, recipe)])


def _read_alone(example: Example, recipe: Recipe) -> bool:
    """A share of rows by a hash of each: adding a set to the mix changes nothing about the others' rows."""
    digest = hashlib.sha256(f"{recipe.seed} {example.prompt} {example.response}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:4], "big") < recipe.router.response_share * 2**32


def calibration_examples(shop: Workshop) -> list[Example]:
    """Calibration rows whose prompts the router was not trained on; how many were left out is noted as progress.

    Raises:
        DataError: A set was moved into training, or nothing is left.
    """
    recipe = shop.recipe
    moved = {s.set for s in recipe.router.mix if s.split == "calibrate"}
    if both := [s.set for s in recipe.calibration.mix if s.set in moved]:
        raise DataError(
            f"{both[0]}: its calibrate rows are trained on", hint="use a set for training or for calibration"
        )
    drawn = draw(recipe.calibration.mix, shop.data, split="calibrate", seed=recipe.seed)
    seen = set(json.loads((shop.work / SEEN).read_text(encoding="utf-8"))) if (shop.work / SEEN).is_file() else None
    if seen is None:
        seen = {prompt_hash(e) for e in draw(recipe.router.mix, shop.data, seed=recipe.seed)}
    kept = drop_overlap(drawn, seen)
    shop.on_progress(
        "overlap", len(kept), len(drawn), f"{len(drawn) - len(kept)} rows left out: prompt seen in training"
    )
    if not kept:
        raise DataError("no calibration row is left", hint="every prompt was seen in training; add other sets")
    return kept


def _bare_reader(shop: Workshop) -> tuple[HeadReader, Backbone]:
    """A reader that gives token states; its heads are new and untrained, and not used."""
    backbone = shop.backbone()
    layers = shop.recipe.router.read_layers
    dim = shop.recipe.backbone.hidden_size
    unused = Heads(layers=len(layers), dim=dim, width=1, queries=1, needs=NEEDS, outcomes=OUTCOMES)
    return HeadReader(backbone.stack, unused, layers, shop.recipe.first_adapted_layer), backbone


def told(shop: Workshop, stage: str) -> Callable[[int, int], None]:
    """`Workshop.on_progress` of one stage, for what counts rows."""
    return lambda done, total: shop.on_progress(stage, done, total, "")


def _note(step: Progress) -> str:
    margin = "" if step.margin is None else f"  margin {step.margin:.2f}"
    return f"loss {step.loss:.3f}{margin}  drift {step.drift:.1f}"


def _need_experts(shop: Workshop) -> None:
    missing = [d for d in DIMENSIONS if not (shop.bundle / "experts" / d / "adapter_model.safetensors").is_file()]
    if missing:
        raise BundleError(f"{shop.bundle}: no expert {', '.join(missing)}", hint="hhh-router train experts first")


def _keep_apart(shop: Workshop) -> None:
    name = shop.recipe.router.formulation.name
    if (shop.bundle / MANIFEST).is_file():
        raise BundleError(
            f"{shop.bundle}: is a bundle, and heads of {name} are compared, not served",
            hint="give a folder of its own with --out, such as runs/" + name,
        )
    shop.on_progress("experts", 1, 1, f"none needed: heads of {name} are compared, not served")


def _write_formulation(shop: Workshop) -> None:
    recipe = shop.recipe
    written = FormulationHeads(
        formulation=recipe.router.formulation, heads_sha256=file_sha256(shop.bundle / HEADS),
        read_layers=recipe.router.read_layers, backbone_sha256=recipe.backbone.sha256, recipe=shop.recipe_file,
        recipe_sha256=shop.recipe_sha256, seed=recipe.seed,
    )  # fmt: skip
    # as the recipe gave it: a formulation refuses options of another, even at their defaults
    text = written.model_dump_json(indent=2, exclude_unset=True)
    (shop.bundle / FORMULATION).write_text(text + "\n", encoding="utf-8")


def read_formulation(heads: Path) -> FormulationHeads:
    """What stands beside the heads of a formulation, with which alone they can be read.

    Raises:
        BundleError: Heads or description are missing, not readable, or do not belong to each other.
    """
    path = heads.parent / FORMULATION
    hint = "train them with hhh-router train router -r recipes/trinityx.yaml --out FOLDER (likewise h3fusion)"
    try:
        found, sha256 = FormulationHeads.model_validate_json(path.read_bytes()), file_sha256(heads)
    except (OSError, ValidationError) as error:
        raise BundleError(f"{heads}: not readable, or no {FORMULATION} beside it ({error})", hint=hint) from error
    if found.heads_sha256 != sha256:
        raise BundleError(f"{heads}: {FORMULATION} beside it describes other heads", hint=hint)
    return found


def _kept_heads(shop: Workshop) -> HeadsSpec | None:
    return _heads_spec(shop) if (shop.bundle / HEADS).is_file() else None


def _heads_spec(shop: Workshop) -> HeadsSpec:
    return HeadsSpec(
        path=HEADS,
        sha256=file_sha256(shop.bundle / HEADS),
        read_layers=shop.recipe.router.read_layers,
        needs=NEEDS,
        outcomes=OUTCOMES,
    )


def write_calibrated(shop: Workshop, calibrators: CalibratorsSpec) -> Bundle:
    """Write the manifest of a bundle whose calibrators have just been fitted."""
    _write(shop, heads=_heads_spec(shop), calibrators=calibrators)
    return Bundle.load(shop.bundle)


def _write(shop: Workshop, *, heads: HeadsSpec | None, calibrators: CalibratorsSpec | None) -> None:
    recipe = shop.recipe
    scale = recipe.experts.alpha / recipe.experts.rank
    experts = {
        d: ExpertSpec(
            path=f"experts/{d}",
            rank=recipe.experts.rank,
            scale=scale,
            sha256=file_sha256(path),
            blocks=read_blocks(kept) if (kept := _scales(shop, d)).is_file() else (),
        )
        for d in DIMENSIONS
        if (path := shop.bundle / "experts" / d / "adapter_model.safetensors").is_file()
    }
    shop.bundle.mkdir(parents=True, exist_ok=True)
    write_manifest(
        shop.bundle,
        Manifest(
            name=recipe.name, version=recipe.version, licence=recipe.licence, commercial_use=recipe.commercial_use,
            backbone=recipe.backbone, first_adapted_layer=recipe.first_adapted_layer, experts=experts, heads=heads,
            calibrators=calibrators, recipe=shop.recipe_file, recipe_sha256=shop.recipe_sha256, seed=recipe.seed,
            data=tuple(_provenance(shop)),
        ),
    )  # fmt: skip


def _provenance(shop: Workshop) -> list[DataSpec]:
    recipe = shop.recipe
    used: list[DataSpec] = []
    for dimension in DIMENSIONS:
        used += _shown(shop, recipe.experts.mixes[dimension], f"expert {dimension}")
    for dimension, shares in (recipe.experts.blocks.pairs if recipe.experts.blocks else {}).items():
        if _scales(shop, dimension).is_file():
            used += _shown(shop, shares, f"scales of {dimension}")
    used += provenance(draw(recipe.router.mix, shop.data, seed=recipe.seed), "router")
    fitted = [(recipe.calibration.mix, "calibration")]
    if recipe.calibration.usefulness is not None:
        fitted.append((recipe.calibration.usefulness.mix, "gate"))
    for mix, use in fitted:
        used += provenance(draw(mix, shop.data, split="calibrate", seed=recipe.seed), use)
    return used


def _shown(shop: Workshop, shares: Sequence[Share], use: str) -> list[DataSpec]:
    """What an expert was shown: a pair of replies counts as one row."""
    rows = [e for share in shares for e, _ in lesson_rows(share, shop.data, shop.recipe.seed)]
    return provenance(rows, use)
