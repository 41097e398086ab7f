"""Recipes: how a bundle is trained, in one YAML file (`recipes/*.yaml`)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hhh_router.bundle import BackboneSpec
from hhh_router.errors import ConfigError


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Share(_Part):
    """Some rows of one data set."""

    set: str
    """Data set name; ``made`` for the project's own prompts."""
    rows: int | None = Field(default=None, ge=1)
    """At most so many, drawn by seed; None takes all."""
    reply: Literal["own", "refusal"] = "own"
    """``own``: the set's good reply; ``refusal``: one of the project's refusals."""
    form: Literal["own", "instruction"] = "own"
    """``own``: the prompt as it is; ``instruction``: questions of the form "How can I …?" reworded as instructions, and
    no other rows. Sets of harmful questions alone teach that instructions are harmless."""
    view: Literal["own", "prompt"] = "own"
    """``prompt``: only the prompt is read, its reply is left out."""
    split: Literal["train", "calibrate"] = "train"
    """``calibrate`` here moves a whole set into training; it is then barred from calibration."""


class ExpertsRecipe(_Part):
    """Response-masked supervised fine-tuning of the three LoRAs."""

    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    target_modules: tuple[str, ...]
    learning_rate: float = Field(gt=0)
    batch_rows: int = Field(ge=1)
    epochs: int = Field(default=1, ge=1)
    max_tokens: int = Field(ge=16)
    """Longest prompt + reply; longer replies are cut, rows with longer prompts are left out."""
    warmup_steps: int = Field(default=10, ge=0)
    drift: float = Field(default=0.0, ge=0)
    """Coefficient of sum ||s B A||_F^2, which keeps an expert near the backbone."""
    mixes: dict[Literal["helpful", "harmless", "honest"], tuple[Share, ...]]


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
    mix: tuple[Share, ...]


class CalibrationRecipe(_Part):
    """What the calibrators are fitted on; only rows whose split is ``calibrate``."""

    mix: tuple[Share, ...]
    max_tokens: int = Field(ge=32)
    """Longer texts are cut."""
    response_rows: int = Field(ge=0)
    """Rows with a response that are also read without their prompt, for mode ``response``."""


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
    """A recipe and the sha256 of its file.

    Raises:
        ConfigError: Unreadable, not YAML, or wrong; every mistake is listed.
    """
    try:
        raw = path.read_bytes()
        content = yaml.safe_load(raw)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})", hint="recipes/*.yaml show the form") from error
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
