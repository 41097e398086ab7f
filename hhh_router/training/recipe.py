"""Recipes: how a bundle is trained, in one YAML file (`recipes/*.yaml`)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hhh_router.bundle import BackboneSpec
from hhh_router.errors import ConfigError
from hhh_router.types import Dimension


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Share(_Part):
    """Some rows of one data set."""

    set: str
    """Data set name; ``made`` for the project's own prompts."""
    rows: int | None = Field(default=None, ge=1)
    """At most so many, drawn by seed; None takes all."""
    skip: int = Field(default=0, ge=0)
    """Rows of that draw that are passed over first, such as those that another share takes."""
    only: str | None = None
    """A need, such as ``harmless``: only rows that are known to have it."""
    reply: Literal["own", "refusal", "backbone"] = "own"
    """``own``: the set's good reply; ``refusal``: one of the project's refusals; ``backbone``: what the bare backbone
    replies, greedily. The last is for experts alone."""
    against: Literal["none", "refusal", "backbone", "faulty"] = "none"
    """A worse reply for experts to learn to avoid: one of the project's refusals, the bare backbone's own reply, or,
    with ``faulty``, a reply of the same set to the same prompt that is labelled with a fault."""
    form: Literal["own", "instruction", "perturbed"] = "own"
    """``own``: the prompt as it is; ``instruction``: questions of the form "How can I …?" reworded as instructions, and
    no other rows. Sets of harmful questions alone teach that instructions are harmless. ``perturbed``: the prompt
    alone, under a rewording of `perturb.TRAIN` that keeps what it asks for."""
    view: Literal["own", "prompt"] = "own"
    """``prompt``: only the prompt is read, its reply is left out."""
    split: Literal["train", "calibrate"] = "train"
    """``calibrate`` here moves a whole set into training; it is then barred from calibration."""

    @property
    def taken(self) -> slice:
        """Which of the drawn rows it takes."""
        return slice(self.skip, None if self.rows is None else self.skip + self.rows)


class BlocksRecipe(_Part):
    """The search for per-block scales of the experts; see `training.blocks`."""

    count: int = Field(default=3, ge=1)
    """Blocks of adapted layers, each with a scale of its own."""
    factors: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5)
    """What is tried for each block; 0 leaves it to the backbone, 1 is the expert as trained."""
    tax: float = Field(default=0.5, ge=0)
    """Reward that is given up for one nat per token less on the backbone's own replies to benign prompts."""
    benign: tuple[Share, ...]
    """Benign prompts; the backbone's own replies to them are what the tax is measured on."""
    pairs: dict[Literal["helpful", "harmless", "honest"], tuple[Share, ...]]
    """Shares with ``against``, of rows that no expert is trained on; an expert without keeps scale 1 everywhere."""


class ExpertsRecipe(_Part):
    """Response-masked fine-tuning of the three LoRAs, with a preference term where a share names a worse reply."""

    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    target_modules: tuple[str, ...]
    learning_rate: float = Field(gt=0)
    learning_rates: dict[Dimension, Annotated[float, Field(gt=0)]] = {}
    """For an expert that learns at another rate than the others."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """``muon``: momentum made orthogonal, for matrices, which all LoRA factors are."""
    batch_rows: int = Field(ge=1)
    epochs: int = Field(default=1, ge=1)
    max_tokens: int = Field(ge=16)
    """Longest prompt + reply; longer replies are cut, rows with longer prompts are left out."""
    own_reply_tokens: int = Field(default=64, ge=1)
    """Length of the bare backbone's replies, where a share asks for them."""
    warmup_steps: int = Field(default=10, ge=0)
    beta: float = Field(default=0.1, gt=0)
    """Inverse temperature of the preference term, per nat of the replies' log-likelihood ratio to the backbone."""
    preference: float = Field(default=1.0, ge=0)
    """Coefficient of the preference term beside the cross-entropy of the good reply."""
    drift: float = Field(default=0.0, ge=0)
    """Coefficient of sum ||s B A||_F^2, which keeps an expert near the backbone."""
    mixes: dict[Literal["helpful", "harmless", "honest"], tuple[Share, ...]]
    blocks: BlocksRecipe | None = None
    """None: every block of layers has scale 1."""

    def rate(self, dimension: Dimension) -> float:
        """The learning rate of one expert."""
        return self.learning_rates.get(dimension, self.learning_rate)


class Importance(_Part):
    """Weights γ of TrinityX's experts; only their proportions matter."""

    helpful: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    harmless: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    honest: float = Field(default=1.0, gt=0, allow_inf_nan=False)


_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "mocae": (),
    "trinityx": ("temperature", "importance", "smoothness"),
    "h3fusion": ("gate_loss",),
}
"""Which options each formulation reads; others would be passed over in silence, so they are refused."""


class Formulation(_Part):
    """What the need heads are trained to say; see `training.formulations`."""

    name: Literal["mocae", "trinityx", "h3fusion"] = "mocae"
    """``mocae``: ours, one binary head per need; the other two, to compare with, divide one softmax among three experts
    and know no base."""
    temperature: float = Field(default=1.0, ge=0.01, le=100)
    """trinityx: the logits are divided by it."""
    importance: Importance = Importance()
    """trinityx: the softmax is multiplied by these and renormalised."""
    smoothness: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    """trinityx: coefficient of KL(mean shares of this step ‖ those of the step before)."""
    gate_loss: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """h3fusion: λ, coefficient of the gate's cross-entropy beside the other heads' losses."""

    @property
    def is_ours(self) -> bool:
        """True for the formulation whose heads a bundle serves."""
        return self.name == "mocae"

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if foreign := sorted(self.model_fields_set - {"name", *_OPTIONS[self.name]}):
            known = ", ".join(_OPTIONS[self.name]) or "none"
            raise ValueError(f"{', '.join(foreign)}: not an option of {self.name}; it has {known}")
        return self


class RouterRecipe(_Part):
    """Heads over the frozen lower layers."""

    read_layers: tuple[int, ...]
    width: int = Field(ge=1)
    """Width of the head network."""
    queries: int = Field(default=8, ge=1)
    """Learned queries that gather from the tokens of each side."""
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    epochs: int = Field(ge=1)
    batch_rows: int = Field(ge=1)
    dropout: float = Field(ge=0, lt=1)
    brier: float = Field(default=0.1, ge=0)
    """Coefficient of the Brier term beside the cross-entropy."""
    balance: float = Field(default=0.5, ge=0, le=1)
    """How far sources count alike: a row of a source with n rows weighs n to the power of minus this."""
    max_tokens: int = Field(ge=32)
    """Longer texts are cut for training."""
    response_share: float = Field(default=0.3, ge=0, le=1)
    """Share of rows with a response that are also read without their prompt, for mode ``response``."""
    formulation: Formulation = Formulation()
    """What the need heads are trained to say."""
    mix: tuple[Share, ...]


class UsefulnessRecipe(_Part):
    """Reference answers that gates are fitted to; see `training.usefulness`."""

    mix: tuple[Share, ...]
    """Rows with the reply that should be given, of split ``calibrate``."""
    temperature: float = Field(default=0.1, gt=0)
    """Nats per token: an expert's share of a row is in proportion to exp(-nll / temperature)."""
    max_tokens: int = Field(default=224, ge=32)
    """Longest prompt + reply; longer ones are cut."""


class CalibrationRecipe(_Part):
    """What the calibrators are fitted on; only rows whose split is ``calibrate``."""

    mix: tuple[Share, ...]
    max_tokens: int = Field(ge=32)
    """Longer texts are cut."""
    response_rows: int = Field(ge=0)
    """Rows with a response that are also read without their prompt, for mode ``response``."""
    usefulness: UsefulnessRecipe | None = None
    """None: the gate is ``odds``, which has nothing to fit."""


class Recipe(_Part):
    """One training recipe."""

    format: Literal[1]
    name: str
    version: str
    licence: str
    commercial_use: bool
    """True refuses every data set whose licence forbids it."""
    seed: int
    backbone: BackboneSpec
    first_adapted_layer: int = Field(ge=1)
    experts: ExpertsRecipe
    router: RouterRecipe
    calibration: CalibrationRecipe


def load_recipe(path: Path) -> tuple[Recipe, str]:
    """A recipe and the sha256 of its file; of its base's bytes and then its own, where it has one.

    A recipe may name another with ``base: FILE``, beside it, and say only what differs: mappings are merged key by
    key, anything else (lists too) replaces what the base has. A base has no base of its own.

    Raises:
        ConfigError: Unreadable, not YAML, or wrong; every mistake is listed.
    """
    raw, content = _read(path)
    if isinstance(content, dict) and "base" in content:
        own = {key: value for key, value in content.items() if key != "base"}
        base_raw, content = _read_base(path, content["base"])
        raw, content = base_raw + raw, _merged(content, own)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        lines = [
            f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']} (found {e['input']!r:.60})" for e in error.errors()
        ]
        raise ConfigError("\n".join(lines), hint="recipes/*.yaml show the form") from error
    if bad := [layer for layer in recipe.router.read_layers if layer > recipe.first_adapted_layer]:
        raise ConfigError(
            f"{path}: router.read_layers: {bad[0]} is above first_adapted_layer {recipe.first_adapted_layer}",
            hint="heads may only read states that no adapter has touched",
        )
    return recipe, hashlib.sha256(raw).hexdigest()


def _read(path: Path) -> tuple[bytes, Any]:
    try:
        raw = path.read_bytes()
        return raw, yaml.safe_load(raw)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})", hint="recipes/*.yaml show the form") from error


def _read_base(path: Path, name: Any) -> tuple[bytes, dict[str, Any]]:
    if not isinstance(name, str):
        raise ConfigError(f"{path}: base: {name!r} is no file name", hint="such as base: smollm2-135m.yaml")
    try:
        raw, content = _read(path.parent / name)
    except ConfigError as error:
        raise ConfigError(
            f"{path}: base: {error.message}", hint="a base lies beside the recipe that names it"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: base: {name} is no mapping", hint="recipes/*.yaml show the form")
    if "base" in content:
        raise ConfigError(
            f"{path}: base: {name} has a base itself ({content['base']!r})",
            hint="name that one, and repeat what differs; recipes extend each other by one step only",
        )
    return raw, content


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """``own`` over ``base``, mappings key by key."""
    both = {
        key: _merged(base[key], value)
        for key, value in own.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **own, **both}
