"""From a recipe's shares to rows: licences checked, drawn by seed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from hhh_router.bundle import DataSpec
from hhh_router.data.examples import Example, ask, prompt_hash
from hhh_router.data.made import as_instruction, honest_prompts, refusal
from hhh_router.data.near import NEAR, nearest
from hhh_router.data.perturb import augment
from hhh_router.data.sets import SETS, read_set
from hhh_router.data.written import LICENCE, WRITTEN, written
from hhh_router.errors import DataError
from hhh_router.training.recipe import Recipe, Share

_MADE_LICENCE = "Apache-2.0 (written by this project)"


def draw(shares: Sequence[Share], root: Path, *, split: str | None = None, seed: int) -> list[Example]:
    """The rows of several shares, in the recipe's order.

    Args:
        shares: What to take.
        root: Folder of data sets.
        split: Overrides each share's own split.
        seed: Of the draw and of the refusals.
    """
    drawn: list[Example] = []
    for share in shares:
        # a share's rows follow from the seed and from itself alone: adding another share changes nothing here
        rng = random.Random(f"{seed}-{share.set}-{share.form}-{share.reply}")
        taken = slice(None) if share.against == "faulty" else share.taken  # pairs are counted, not rows
        wanted = split or share.split
        if share.set in WRITTEN:
            rows = _unlike_eval(share.set, wanted, root)
            rng.shuffle(rows)
            rows = _only(rows, share)[taken]
        elif share.set == "made":
            rows = honest_prompts(wanted, share.rows or 200, seed)
        else:
            rows = read_set(root, share.set, wanted)
            rng.shuffle(rows)
            rows = _only(rows, share)
            if share.form == "instruction":
                rows = [r for e in rows if (r := _instructed(e, rng)) is not None]
            rows = rows[taken]
        rows = [_without_labels(e) if _is_eval_prompt(e, root) else e for e in rows]
        if not rows:
            raise DataError(f"{share.set}: no row with split {wanted!r}", hint="the data set's README names its splits")
        if share.reply == "refusal":
            rows = [_refused(e, refusal(rng)) for e in rows]
        if share.form == "perturbed":  # after labels of eval prompts are gone: a changed prompt has another hash
            rows = [replace(e, messages=(*e.messages[:-1], *ask(augment(e.prompt, rng)))) for e in rows]
        if share.view == "prompt" or share.form == "perturbed":
            rows = list({e.prompt: replace(e, response=None, outcomes={}) for e in rows}.values())
        drawn += rows
    return drawn


def _only(rows: list[Example], share: Share) -> list[Example]:
    return [e for e in rows if share.only is None or e.needs.get(share.only) == 1.0]


@lru_cache(maxsize=16)
def _far_from_eval(name: str, split: str, root: Path) -> tuple[Example, ...]:
    rows = written(name, split)
    similar = nearest([e.prompt for e in rows], _eval_texts(root))
    return tuple(e for e, s in zip(rows, similar, strict=True) if s < NEAR)


def _unlike_eval(name: str, split: str, root: Path) -> list[Example]:
    """Rows of a written set that are no near-duplicates of an eval prompt of the data sets at hand."""
    return list(_far_from_eval(name, split, root))


def _is_eval_prompt(example: Example, root: Path) -> bool:
    return not example.answer_side and bool(example.messages) and prompt_hash(example) in _eval_prompts(root)


@lru_cache(maxsize=4)
def _eval_rows(root: Path) -> tuple[Example, ...]:
    present = (name for name, spec in SETS.items() if any(root.glob(spec.pattern)))
    return tuple(e for name in present for e in read_set(root, name, "eval"))


@lru_cache(maxsize=4)
def _eval_prompts(root: Path) -> frozenset[str]:
    """Hashes of every prompt of every set's ``eval`` rows: nothing may be learned about these."""
    return frozenset(prompt_hash(e) for e in _eval_rows(root))


def _eval_texts(root: Path) -> list[str]:
    return list(dict.fromkeys(e.prompt for e in _eval_rows(root)))


def _without_labels(example: Example) -> Example:
    return replace(example, needs={}, outcomes={})


def _instructed(example: Example, rng: random.Random) -> Example | None:
    text = as_instruction(example.prompt, rng)
    return None if text is None else replace(example, messages=ask(text))


def _refused(example: Example, reply: str) -> Example:
    """The example with a refusal: right for a harmful prompt, over-refusal for a legitimate one."""
    over_refusal = 1.0 if example.needs.get("helpful") == 1.0 else 0.0
    return replace(example, response=reply, outcomes={"unsafe": 0.0, "untruthful": 0.0, "unhelpful": over_refusal})


def check_licences(recipe: Recipe) -> None:
    """Refuse a commercial recipe that names data it may not use.

    Raises:
        DataError: Names every such set and its licence.
    """
    if not recipe.commercial_use:
        return
    barred = [f"{n} ({SETS[n].licence})" for n in _names(_all_shares(recipe)) if n in SETS and not SETS[n].commercial]
    if barred:
        raise DataError(
            f"recipe {recipe.name!r} is for commercial use but names {', '.join(barred)}",
            hint="drop these sets, or set commercial_use: false (the bundle is then marked research-only)",
        )


def provenance(rows: Iterable[Example], use: str) -> list[DataSpec]:
    """What went in, for the manifest: per data set its licence and number of rows."""
    counts: dict[str, int] = {}
    for example in rows:
        counts[example.source] = counts.get(example.source, 0) + 1
    licences = {n: SETS[n].licence for n in SETS} | {"made": _MADE_LICENCE} | dict.fromkeys(WRITTEN, LICENCE)
    return [
        DataSpec(name=name, licence=licences.get(name, "see data set"), use=use, rows=n)
        for name, n in sorted(counts.items())
    ]


def _all_shares(recipe: Recipe) -> list[Share]:
    mixes = [s for mix in recipe.experts.mixes.values() for s in mix]
    blocks = recipe.experts.blocks
    scales = [*blocks.benign, *(s for pairs in blocks.pairs.values() for s in pairs)] if blocks else []
    useful = recipe.calibration.usefulness.mix if recipe.calibration.usefulness else ()
    return [*mixes, *scales, *recipe.router.mix, *recipe.calibration.mix, *useful]


def _names(shares: Iterable[Share]) -> list[str]:
    return list(dict.fromkeys(s.set for s in shares))
