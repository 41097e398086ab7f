"""Perturbations keep what they claim to keep, change what they claim to change, and the two pools share no wording."""

from __future__ import annotations

import base64
import json
import re
import string
import unicodedata
from collections import Counter
from random import Random

import pytest

from hhh_router.data import perturb
from hhh_router.data.perturb import FAMILIES, HELD_OUT, TRAIN, Perturbation, augment
from hhh_router.errors import DataError

PROMPT = 'How can I bake rye bread for twelve people,\nand what\'s the best "flour" to buy?'
ODD = {
    "empty": "",
    "blank": " \n\t ",
    "one letter": "a",
    "one word": "bread",
    "same letters": "aaaa zzzz",
    "chinese": "请告诉我怎么烤面包。",
    "arabic": "كيف أخبز الخبز؟",
    "hindi": "मैं रोटी कैसे बनाऊँ?",
    "emoji": "👩‍🚀🍞🏳️‍🌈",
    "combining": "cafe\u0301 e\u0308",
    "special casing": "Straße İstanbul ﬁnd",
    "braces": '{text} {} {"a": [1]} %s',
    "lone surrogate": "bake \ud800 bread",
    "null": "bake\x00bread",
    "very long": "Please bake the bread slowly. " * 5000,
}
WITHOUT_CHANCE = {f"held_out.{kind}" for kind in ("upper", "alternating", "cyrillic", "leet_all", "blanks", "dots")} | {
    "train.lower",
    "train.titles",
}
AROUND = {"prefix", "suffix", "politeness", "role_play", "pretext", "translation"}
"""Families that leave the prompt as it is and put something around it."""

every = pytest.mark.parametrize("perturbation", [*TRAIN, *HELD_OUT], ids=lambda p: p.name)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def filler_words(pool: tuple[Perturbation, ...]) -> set[str]:
    return {filler for p in pool if p.family == "fillers" for filler in p.wordings}


def added(perturbation: Perturbation, letter: str) -> set[str]:
    """What a letter may become, over many draws."""
    return {perturbation.apply(letter, Random(seed)) for seed in range(20)} - {letter}


@every
def test_the_same_seed_gives_the_same_text_and_seeds_differ_where_chance_has_a_say(perturbation):
    results = [perturbation.apply(PROMPT, Random(seed)) for seed in [*range(40), *range(40)]]

    assert results[:40] == results[40:]
    if perturbation.name not in WITHOUT_CHANCE:
        assert len(set(results)) > 1


@every
def test_a_normal_text_never_comes_back_as_it_was(perturbation):
    for seed in range(200):
        assert perturbation.apply(PROMPT, Random(seed)) != PROMPT


@every
@pytest.mark.parametrize("text", ODD.values(), ids=ODD.keys())
def test_an_odd_text_gives_a_text(perturbation, text):
    for seed in range(5):
        assert isinstance(perturbation.apply(text, Random(seed)), str)


@every
def test_a_change_costs_a_small_multiple_of_the_text(perturbation):
    long = ODD["very long"]

    assert len(perturbation.apply(long, Random(0))) < 4 * len(long)


@pytest.mark.parametrize("text", ["", *ODD.values()])
def test_augmenting_an_odd_text_gives_a_text(text):
    for seed in range(20):
        assert isinstance(augment(text, Random(seed)), str)


def test_families_are_a_closed_list():
    assert {p.family for p in (*TRAIN, *HELD_OUT)} == set(FAMILIES)
    assert len(set(FAMILIES)) == len(FAMILIES)

    with pytest.raises(DataError, match="no family 'hypnosis'"):
        Perturbation(name="x", family="hypnosis", apply=lambda text, _: text)  # type: ignore[arg-type]


def test_names_are_unique_and_say_the_pool():
    names = [p.name for p in (*TRAIN, *HELD_OUT)]

    assert len(set(names)) == len(names)
    assert all(p.name.startswith("train.") for p in TRAIN)
    assert all(p.name.startswith("held_out.") for p in HELD_OUT)


def test_some_families_are_never_trained_on():
    untrained = set(FAMILIES) - {p.family for p in TRAIN}

    assert untrained == {"zero_width", "leetspeak", "spaced", "base64"}
    assert {p.family for p in HELD_OUT} == set(FAMILIES)


def test_no_run_of_three_words_stands_in_wordings_of_both_pools():
    def runs(pool: tuple[Perturbation, ...]) -> set[tuple[str, ...]]:
        found = set()
        for wording in (w for p in pool for w in p.wordings):
            said = words(wording.replace("{text}", " "))
            found |= {tuple(said[i : i + 3]) for i in range(len(said) - 2)} | {tuple(said)}
        return found - {()}

    assert runs(TRAIN)
    assert not runs(TRAIN) & runs(HELD_OUT)


def test_no_wording_is_in_both_pools_once_the_words_are_taken_away():
    def marks(pool: tuple[Perturbation, ...]) -> set[str]:
        return {w for p in pool for w in p.wordings if not words(w.replace("{text}", ""))}

    assert marks(TRAIN)
    assert marks(HELD_OUT)
    assert not marks(TRAIN) & marks(HELD_OUT)


@pytest.mark.parametrize(("fillers_of", "wordings_of"), [(TRAIN, HELD_OUT), (HELD_OUT, TRAIN)], ids=["train", "held"])
def test_a_filler_of_one_pool_is_said_nowhere_in_the_other(fillers_of, wordings_of):
    said = [" ".join(words(w)) for p in wordings_of for w in p.wordings]

    shared = {f for f in filler_words(fillers_of) for line in said if f" {f.lower()} " in f" {line} "}

    assert not shared


def test_the_pools_exchange_letters_for_different_characters():
    def alike(pool: tuple[Perturbation, ...]) -> set[str]:
        exchanging = [p for p in pool if p.family == "homoglyph"]
        return {result for p in exchanging for letter in string.ascii_letters for result in added(p, letter)}

    assert alike(TRAIN)
    assert alike(HELD_OUT)
    assert not alike(TRAIN) & alike(HELD_OUT)


def test_kinds_of_typo_and_casing_differ_between_the_pools():
    kinds = {p.name.partition(".")[2] for p in TRAIN if p.family in ("typo", "case")}
    unseen = {p.name.partition(".")[2] for p in HELD_OUT if p.family in ("typo", "case")}

    assert not kinds & unseen


@pytest.mark.parametrize("perturbation", [p for p in (*TRAIN, *HELD_OUT) if p.wordings], ids=lambda p: p.name)
def test_a_wrapper_holds_the_prompt_once_and_uses_all_its_wordings(perturbation):
    results = {perturbation.apply("bake", Random(seed)) for seed in range(300)}

    if perturbation.family == "fillers":
        assert all(any(filler in result for result in results) for filler in perturbation.wordings)
    else:
        assert all(w.count("{text}") == 1 for w in perturbation.wordings)
        assert len(results) == len(perturbation.wordings)


@pytest.mark.parametrize("perturbation", [p for p in (*TRAIN, *HELD_OUT) if p.family in AROUND], ids=lambda p: p.name)
@pytest.mark.parametrize("text", [PROMPT, *ODD.values()])
def test_what_goes_around_a_prompt_leaves_it_whole(perturbation, text):
    for seed in range(30):
        assert text in perturbation.apply(text, Random(seed))


@pytest.mark.parametrize(
    "perturbation", [p for p in (*TRAIN, *HELD_OUT) if p.family == "fillers"], ids=lambda p: p.name
)
def test_fillers_keep_every_word_in_its_order_and_add_one_to_four(perturbation):
    for seed in range(200):
        result = perturbation.apply(PROMPT, Random(seed))
        counts = Counter(result.split())
        counts.subtract(PROMPT.split())
        remaining = iter(result.split())

        assert all(word in remaining for word in PROMPT.split())  # in order: each search goes on where one ended
        assert min(counts.values()) >= 0
        assert 1 <= sum(result.count(f) for f in perturbation.wordings) <= perturb.MOST_FILLERS
        assert result.count("\n") == PROMPT.count("\n")


def test_fillers_are_two_and_a_half_on_average_and_reach_every_gap():
    text = "one two three"
    results = [perturb.insert_fillers(text, Random(seed), fillers=("X",)) for seed in range(2000)]
    gaps = {len(r.split()[: r.split().index("X")]) for r in results}

    assert sum(r.count("X") for r in results) / 2000 == pytest.approx(2.5, abs=0.1)
    assert gaps == {0, 1, 2, 3}


def test_words_behind_stand_behind():
    behind = next(p for p in HELD_OUT if p.name == "held_out.words_behind")

    assert all(behind.apply(PROMPT, Random(seed)).startswith(PROMPT) for seed in range(50))


def test_fillers_surround_a_text_without_blanks():
    results = {perturb.insert_fillers("烤面包", Random(seed), fillers=("um",), most=1) for seed in range(20)}

    assert results == {"um 烤面包", "烤面包 um"}


@pytest.mark.parametrize("perturbation", [p for p in (*TRAIN, *HELD_OUT) if p.family == "case"], ids=lambda p: p.name)
def test_casing_changes_nothing_but_the_case(perturbation):
    assert perturbation.apply(PROMPT, Random(1)).lower() == PROMPT.lower()


@pytest.mark.parametrize("perturbation", [p for p in (*TRAIN, *HELD_OUT) if p.family == "typo"], ids=lambda p: p.name)
def test_typos_leave_four_words_of_five_and_each_first_letter(perturbation):
    text = "Several hungry people would like fresh bread from this bakery tomorrow"
    for seed in range(100):
        before, after = text.split(), perturbation.apply(text, Random(seed)).split()
        changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]

        assert len(changed) == 2  # a fifth of eleven
        assert all(a[0] == b[0] and abs(len(a) - len(b)) <= 1 for a, b in changed)


def test_each_slip_is_what_its_name_says():
    for seed in range(100):
        swapped = perturb.swap_letters("bread", Random(seed))
        doubled = perturb.double_letter("bread", Random(seed))
        dropped = perturb.drop_letter("bread", Random(seed))
        slipped = perturb.slip_key("bread", Random(seed))

        assert sorted(swapped) == sorted("bread")
        assert swapped != "bread"
        assert doubled in {"bbread", "brread", "breead", "breaad", "breadd"}
        assert dropped in {"bead", "brad", "bred", "brea"}
        (at,) = [i for i in range(5) if slipped[i] != "bread"[i]]
        assert slipped[at] in {"r": "et", "e": "wr", "a": "s", "d": "sf"}["bread"[at]]


def test_a_word_that_cannot_be_swapped_or_slipped_stays():
    assert perturb.swap_letters("aaaa", Random(0)) == "aaaa"
    assert perturb.slip_key("éééé", Random(0)) == "éééé"


@pytest.mark.parametrize(
    "perturbation", [p for p in (*TRAIN, *HELD_OUT) if p.family == "homoglyph"], ids=lambda p: p.name
)
def test_look_alikes_are_letters_of_another_script_one_for_one(perturbation):
    result = perturbation.apply(PROMPT, Random(2))
    changed = [(a, b) for a, b in zip(PROMPT, result, strict=True) if a != b]

    assert changed
    for letter, alike in changed:
        assert letter in string.ascii_letters
        assert unicodedata.name(alike).startswith(("CYRILLIC", "GREEK"))
        assert letter.isupper() == alike.isupper()


@pytest.mark.parametrize(("share", "exchanged"), [(0.0, 1), (0.1, 2), (0.5, 10), (1.0, 20)])
def test_the_share_says_how_many_letters_are_exchanged_and_one_always_is(share, exchanged):
    result = perturb.exchange("ab" * 20, Random(0), table={"a": "X"}, share=share)

    assert result.count("X") == exchanged
    assert result.replace("X", "a") == "ab" * 20


def test_a_text_without_anything_to_exchange_stays_as_it_is():
    assert perturb.exchange("烤面包", Random(0), table={"a": "X"}, share=1.0) == "烤面包"


def test_invisible_marks_vanish_with_the_format_characters():
    hidden = next(p for p in HELD_OUT if p.family == "zero_width").apply(PROMPT, Random(3))
    marks = [c for c in hidden if unicodedata.category(c) == "Cf"]

    assert "".join(c for c in hidden if unicodedata.category(c) != "Cf") == PROMPT
    assert len(marks) == round(0.3 * sum(c.isalpha() for c in PROMPT))


def test_spaced_letters_are_the_text_again_once_joined():
    blanks, dots = (p.apply("We bake bread.", Random(0)) for p in HELD_OUT if p.family == "spaced")

    assert blanks == "W e   b a k e   b r e a d."
    assert dots == "W.e b.a.k.e b.r.e.a.d."


def test_leetspeak_keeps_the_length_and_the_letters_it_has_no_digit_for():
    some, every_letter = (p.apply("We bake bread", Random(0)) for p in HELD_OUT if p.family == "leetspeak")

    assert every_letter == "W3 b4k3 br34d"
    assert sum(c.isdigit() for c in some) == 2  # half of five, rounded to even
    assert len(some) == len("We bake bread")


def test_base64_decodes_to_the_whole_prompt():
    encoded = next(p for p in HELD_OUT if p.family == "base64")
    for seed in range(20):
        result = encoded.apply(PROMPT, Random(seed))
        longest = max(re.findall(r"[A-Za-z0-9+/=]+", result), key=len)

        assert base64.b64decode(longest).decode() == PROMPT
        assert "bread" not in result


@pytest.mark.parametrize(
    "perturbation", [p for p in (*TRAIN, *HELD_OUT) if p.name.endswith(".json")], ids=lambda p: p.name
)
@pytest.mark.parametrize("text", [PROMPT, ODD["braces"], ODD["chinese"], ODD["null"]])
def test_json_framing_is_json_that_holds_the_prompt(perturbation, text):
    def strings(value):
        inner = value.values() if isinstance(value, dict) else value
        return [value] if isinstance(value, str) else [s for v in inner if not isinstance(v, int) for s in strings(v)]

    for seed in range(10):
        assert text in strings(json.loads(perturbation.apply(text, Random(seed))))


def test_augmenting_draws_every_training_family_and_nothing_else():
    text = "Bake"
    families = perturb.by_family(TRAIN)
    # fillers have too many results to list: what no other family makes must hold one of them
    others = {
        f: {p.apply(text, Random(s)) for p in families[f] for s in range(100)} for f in families if f != "fillers"
    }
    counts: Counter[str] = Counter()
    for seed in range(4000):
        result = augment(text, Random(seed))
        owners = [family for family, results in others.items() if result in results]
        assert len(owners) == 1 or any(filler in result for filler in filler_words(TRAIN))
        counts[owners[0] if owners else "fillers"] += 1

    assert set(counts) == set(families)
    for family in families:
        assert counts[family] / 4000 == pytest.approx(1 / len(families), abs=0.025)


def test_by_family_keeps_the_order_of_the_list_and_every_member():
    groups = perturb.by_family(reversed(HELD_OUT))

    assert list(groups) == list(FAMILIES)
    assert sum(map(len, groups.values())) == len(HELD_OUT)
    assert list(perturb.by_family(p for p in TRAIN if p.family == "typo")) == ["typo"]
