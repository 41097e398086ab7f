"""What an expert is shown: prompts with a good reply, some with a worse reply beside it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hhh_router.data.examples import Example
from hhh_router.data.made import refusal
from hhh_router.errors import ContextTooLong, DataError
from hhh_router.model.base import Backbone
from hhh_router.model.runner import Reply, Runner, as_reply
from hhh_router.training.mix import draw
from hhh_router.training.recipe import ExpertsRecipe, Share
from hhh_router.types import ReadRequest

_CHUNK = 128  # replies of the backbone that are written to disk together; what a kill can cost
_LEAST_REPLY = 4  # tokens: less of a reply teaches nothing


@dataclass(frozen=True, slots=True)
class Lesson:
    """Tokens of one training conversation; the loss counts from the reply on."""

    good: Reply
    worse: Reply | None = None
    """The same prompt with the reply to be avoided; None where there is none."""


def lessons(
    shares: Sequence[Share],
    plan: ExpertsRecipe,
    backbone: Backbone,
    data: Path,
    *,
    seed: int,
    folder: Path,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> list[Lesson]:
    """The lessons of an expert's mix, in the recipe's order.

    Args:
        shares: The mix.
        plan: Lengths.
        backbone: Bare; where a share asks for its own replies they are generated, greedily, and kept.
        data: Folder of data sets.
        seed: Of the draw.
        folder: Where generated replies are kept.
        on_rows: Told how many replies have been generated, of how many.

    Raises:
        DataError: A share asks for faulty replies and its set has none.
    """
    taken = [(share, lesson_rows(share, data, seed)) for share in shares]
    wanted = [e for share, rows in taken if "backbone" in (share.reply, share.against) for e, _ in rows]
    own = _backbone_replies(wanted, plan, backbone, folder, on_rows) if wanted else {}
    found: list[Lesson] = []
    for share, rows in taken:
        rng = random.Random(f"{seed}-{share.set}-{share.against}")
        for example, worse in rows:
            reply = own.get(_key(example))
            good = reply if share.reply == "backbone" else example.response
            rival = {"none": None, "faulty": worse, "refusal": refusal(rng), "backbone": reply}[share.against]
            if (lesson := _lesson(example, good, rival, reply, plan, backbone)) is not None:
                found.append(lesson)
    return found


def lesson_rows(share: Share, data: Path, seed: int) -> list[tuple[Example, str | None]]:
    """The rows a share takes, each with the faulty reply that it is set against, if it is.

    Raises:
        DataError: The share asks for faulty replies and its set has none.
    """
    rows = draw([share], data, seed=seed)
    if share.against == "faulty":
        return _pairs(rows, share)[share.taken]
    return [(e, None) for e in rows if share.reply == "backbone" or _is_good(e)]


def _is_good(example: Example) -> bool:
    labelled = bool(example.needs or example.outcomes)  # rows lose their labels where the prompt is an eval prompt
    return example.response is not None and labelled and not any(example.outcomes.values())


def _pairs(rows: Sequence[Example], share: Share) -> list[tuple[Example, str | None]]:
    """A good reply to each prompt with each faulty reply to it."""
    good = {e.messages: e for e in rows if _is_good(e)}
    pairs = [
        (good[e.messages], e.response) for e in rows if e.response and any(e.outcomes.values()) and e.messages in good
    ]
    if not pairs:
        raise DataError(f"{share.set}: no prompt has both a good and a faulty reply", hint="leave out against: faulty")
    return pairs


def _lesson(
    example: Example, good: str | None, worse: str | None, own: str | None, plan: ExpertsRecipe, backbone: Backbone
) -> Lesson | None:
    """None where a prompt leaves no room for a reply.

    The backbone's own reply, ``own``, gets no end mark where it was cut off: nothing should learn to stop mid-sentence.
    """
    if good is None or not _has_room(example, plan, backbone):
        return None
    replies = [r for r in (good, worse) if r is not None]
    cut = [r == own and len(backbone.encoder.response_ids(r)) >= plan.own_reply_tokens - 1 for r in replies]
    return Lesson(
        *(
            as_reply(backbone, example.messages, r, plan.max_tokens, end=not c)
            for r, c in zip(replies, cut, strict=True)
        )
    )


def _has_room(example: Example, plan: ExpertsRecipe, backbone: Backbone) -> bool:
    try:
        prompt = backbone.encoder.encode(ReadRequest(messages=example.messages)).ids
    except ContextTooLong:
        return False
    return len(prompt) + _LEAST_REPLY <= plan.max_tokens


def _backbone_replies(
    examples: Sequence[Example],
    plan: ExpertsRecipe,
    backbone: Backbone,
    folder: Path,
    on_rows: Callable[[int, int], None],
) -> dict[str, str]:
    """What the bare backbone replies to each prompt; those generated before are read from ``folder``."""
    path = folder / f"backbone-replies-{plan.own_reply_tokens}.jsonl"
    known: dict[str, str] = {}
    if path.is_file():
        lines = path.read_bytes().rpartition(b"\n")[0].splitlines()  # a kill may have cut the last line off
        known = dict(json.loads(line) for line in lines)
    new = {_key(e): e for e in examples if _key(e) not in known}
    missing = [(key, e) for key, e in new.items() if _has_room(e, plan, backbone)]  # others become no lesson
    runner = Runner(backbone, None, 0)
    folder.mkdir(parents=True, exist_ok=True)
    whole = "".join(json.dumps(row) + "\n" for row in known.items())
    if not path.is_file() or path.read_text(encoding="utf-8") != whole:  # other processes may be reading what is whole
        path.write_text(whole, encoding="utf-8")
    for start in range(0, len(missing), _CHUNK):
        on_rows(start, len(missing))
        chunk = missing[start : start + _CHUNK]
        prompts = [backbone.encoder.encode(ReadRequest(messages=e.messages)).ids for _, e in chunk]
        replies = runner.generate(prompts, None, max_tokens=plan.own_reply_tokens)
        written = {key: reply for (key, _), reply in zip(chunk, replies, strict=True)}
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in written.items())
        known |= written
    on_rows(len(missing), len(missing))
    return known


def _key(example: Example) -> str:
    turns = [(m.role, m.content) for m in example.messages]
    return hashlib.sha256(repr(turns).encode("utf-8", "replace")).hexdigest()[:32]
