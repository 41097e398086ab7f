"""Whether replies follow instructions that a program can verify: the figures of IFEval, without a judge.

Written from the definitions in Zhou et al. 2023, table 1. Where those leave a case open, it is decided
as the published figures decide it: keywords count inside longer words, forbidden words only as whole ones, and *I* is
a word in capitals. It differs from their program in these, so compare systems by it and not with published figures:

- Sentences: by the rule in `_sentences`, where theirs is a trained splitter.
- Languages: by script and stop words (`_spoken`), where theirs is a trained classifier.
- Words in capitals: by `_CAPITALISABLE`, where theirs is a tokeniser.
- A bullet has a space after its mark, so that a line which begins with ``*emphasis*`` is none; a highlight does not
  begin or end with a space; a placeholder has something in its brackets; ``******`` does not divide paragraphs;
  ``P.P.S.`` is no ``P.S.``
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hhh_router.calibration.metrics import Floats, bootstrap_interval
from hhh_router.data.examples import Example, ask, data_hash
from hhh_router.data.sets import read_jsonl
from hhh_router.errors import DataError

IFEVAL = "ifeval/ifeval.jsonl"
"""The rows' file, in the folder of data sets."""


@dataclass(frozen=True, slots=True)
class IFEvalRow:
    """One prompt and what a reply to it has to keep to.

    Raises:
        DataError: No instructions, an unknown one, or keyword arguments that do not fit it.
    """

    prompt: str
    instructions: tuple[tuple[str, Mapping[str, Any]], ...]
    """Id (a key of `INSTRUCTIONS`) and keyword arguments of each, at least one; an id may recur."""

    def __post_init__(self) -> None:
        if not self.instructions:
            raise DataError("a row without instructions", hint="drop it: no reply could break anything")
        for name, kwargs in self.instructions:
            _values(name, kwargs, self.prompt)


def read_ifeval(data: Path) -> list[IFEvalRow]:
    """Every eval row of `IFEVAL`, in the file's order.

    Args:
        data: Folder that holds the data sets.

    Raises:
        DataError: The file is not there, or a row is broken (file and row are named).
    """
    path = data / IFEVAL
    if not path.is_file():
        raise DataError(f"{path}: no such file", hint="--data or HHH_ROUTER_DATA names the folder of sets")
    rows = []
    for number, row in enumerate(read_jsonl(path), start=1):
        if row.get("split") != "eval":
            continue
        try:
            pairs = tuple(zip(row["instruction_id_list"], row["kwargs"], strict=True))
            rows.append(IFEvalRow(row["prompt"], pairs))
        except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
            why = f"no field {error}" if isinstance(error, KeyError) else getattr(error, "message", error)
            raise DataError(f"{path}:{number}: {why}", hint="repair or drop the row") from error
    return rows


def follows(instruction_id: str, kwargs: Mapping[str, Any], prompt: str, reply: str) -> bool:
    """True when the reply keeps to one instruction, read strictly; a blank reply keeps to none.

    Args:
        instruction_id: A key of `INSTRUCTIONS`.
        kwargs: Its keyword arguments, as the rows have them; one that is None counts as not given.
        prompt: What the reply answers; what ``combination:repeat_prompt`` repeats where its kwargs do not say.
        reply: The generated text.

    >>> follows("punctuation:no_comma", {}, "Say hello.", "Hello there")
    True
    >>> follows("keywords:frequency", {"keyword": "hello", "frequency": 2, "relation": "at least"}, "", "Hello there")
    False

    Raises:
        DataError: The id is unknown, or an argument is missing, unknown or out of range.
    """
    values = _values(instruction_id, kwargs, prompt)
    return bool(reply.strip()) and INSTRUCTIONS[instruction_id][0](reply, *values)


def ifeval_figures(rows: Sequence[IFEvalRow], replies: Sequence[str], *, seed: int) -> dict[str, Any]:
    """Shares of prompts and of instructions that the replies follow, each with a 95 % bootstrap interval over prompts.

    A prompt counts when all of its instructions are followed. Loosely, an instruction is followed when any form of the
    reply follows it: with or without its first line, its last line and all of its asterisks.

    Args:
        rows: What was asked.
        replies: One per row, in the same order.
        seed: Of the bootstrap.

    Returns:
        Plain values for JSON. Keys: ``n`` (prompts), ``instructions_n``, ``seed``, ``data_sha256`` (of prompts and
        instructions), and with an ``…_interval`` of two numbers each ``prompt_strict``, ``instruction_strict``,
        ``prompt_loose`` and ``instruction_loose``.

    Source: Zhou et al. 2023, strict and loose accuracy.

    Raises:
        DataError: No rows, or not one reply per row.
    """
    if not rows or len(rows) != len(replies):
        raise DataError(f"ifeval: {len(rows)} rows, {len(replies)} replies", hint="give one reply per row")
    asked = np.array([len(row.instructions) for row in rows], np.float64)
    figures: dict[str, Any] = {"n": len(rows), "instructions_n": int(asked.sum()), "seed": seed}
    figures["data_sha256"] = _data_sha256(rows)
    for name, forms in (("strict", lambda reply: [reply]), ("loose", _loose_forms)):
        kept = np.array([_kept(row, forms(reply)) for row, reply in zip(rows, replies, strict=True)], np.float64)
        for unit, columns in (("prompt", (kept == asked, np.ones_like(asked))), ("instruction", (kept, asked))):
            figures[f"{unit}_{name}"] = _quotient(*columns)
            figures[f"{unit}_{name}_interval"] = list(bootstrap_interval(_quotient, *columns, seed=seed))
    return figures


def _kept(row: IFEvalRow, forms: Sequence[str]) -> int:
    """How many of the row's instructions at least one form of the reply follows."""
    return sum(any(follows(name, kwargs, row.prompt, f) for f in forms) for name, kwargs in row.instructions)


def _loose_forms(reply: str) -> list[str]:
    lines = reply.split("\n")
    cut = [reply, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return cut + [text.replace("*", "") for text in cut]


def _quotient(hits: Floats, of: Floats) -> float:
    return float(hits.sum() / of.sum())


def _data_sha256(rows: Sequence[IFEvalRow]) -> str:
    # the data has no replies, so what a reply must keep to takes that place
    asked = [(r.prompt, json.dumps([(n, dict(k)) for n, k in r.instructions], sort_keys=True)) for r in rows]
    return data_hash(Example(source="ifeval", split="eval", messages=ask(p), response=text) for p, text in asked)


def _values(instruction_id: str, kwargs: Mapping[str, Any], prompt: str) -> list[Any]:
    """The checked arguments, in the order of the table."""
    if instruction_id not in INSTRUCTIONS:
        raise DataError(f"unknown instruction {instruction_id!r}", hint=f"known: {', '.join(INSTRUCTIONS)}")
    keys = INSTRUCTIONS[instruction_id][1].split()
    given = {key: value for key, value in kwargs.items() if value is not None}
    if "prompt_to_repeat" in keys:
        given.setdefault("prompt_to_repeat", prompt)
    wrong = [f"{key} is missing" for key in keys if key not in given]
    wrong += [f"{key} is unknown" for key in given if key not in keys]
    kinds = {key: _KWARGS.get(key, _COUNT) for key in given if key in keys}
    wrong += [f"{key} is {given[key]!r}, not {what}" for key, (what, fits) in kinds.items() if not fits(given[key])]
    if wrong:
        raise DataError(f"{instruction_id}: {', '.join(wrong)}", hint=f"it takes: {', '.join(keys) or 'nothing'}")
    return [given[key] for key in keys]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


_COUNT = ("a whole number above 0", lambda n: isinstance(n, int) and not isinstance(n, bool) and n > 0)
_TEXT = ("a text", _is_text)
_TEXTS = ("a list of texts", lambda texts: isinstance(texts, list) and bool(texts) and all(map(_is_text, texts)))
_RELATION = ("'at least' or 'less than'", lambda relation: relation in ("at least", "less than"))
_KWARGS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("relation", "let_relation", "capital_relation"), _RELATION),
    **dict.fromkeys(("keyword", "first_word", "prompt_to_repeat", "end_phrase"), _TEXT),
    **dict.fromkeys(("postscript_marker", "section_spliter"), _TEXT),
    **dict.fromkeys(("keywords", "forbidden_words"), _TEXTS),
    "letter": ("one character", lambda letter: _is_text(letter) and len(letter) == 1),
    "language": ("a language this can tell", lambda code: isinstance(code, str) and code in _LANGUAGES),
}
"""Argument → what it has to be, and whether a value is; any other is a count. The names are the data's."""


def _holds(count: int, wanted: int, relation: str) -> bool:
    return count >= wanted if relation == "at least" else count < wanted


def _bare(text: str) -> str:
    return text.strip().lower()


def _occurrences(word: str, text: str) -> int:
    return text.lower().count(_bare(word))


def _repeats(reply: str, text: str, frequency: int, relation: str) -> bool:
    return _holds(_occurrences(text, reply), frequency, relation)


def _avoids(reply: str, forbidden: Sequence[str]) -> bool:
    return not any(re.search(rf"(?<!\w){re.escape(w.strip())}(?!\w)", reply, re.IGNORECASE) for w in forbidden)


_STOP_WORDS = {
    "LATIN": {
        "de": "der die das und ist nicht ein eine zu den mit für auf von ich sie es im dem wir sich auch",
        "en": "the of and to in is it that for with you as on are this be at not have from by i we my a or your was",
        "es": "el de que y la en los del se las por un para con no una su es al lo como más",
        "fi": "ja on ei se että hän oli ovat mutta kun niin tai myös mitä minä olen sen joka kuin voi hänen olla",
        "fr": "le de et la les des en un une est que pour dans qui pas du au il sur je avec ce",
        "it": "il di che e la per un non è una sono con del le si da gli della ma mi in più",
        "nl": "de het een en van is niet dat op te voor met zijn ik je aan er maar ook deze wordt",
        "pl": "i w nie na się z do to jest że jak o co ale po tak za od są oraz",
        "pt": "o de que e do da em um para com não uma os no se na por mais as é ao são",
        "sw": "na ya wa kwa ni la katika za cha hii kuwa yake kama hiyo au pia lakini sana watu mimi wewe huo",
        "vi": "và của là có không được cho một các trong này với người những để đã tôi thì",
    },
    "CYRILLIC": {
        "bg": "и на да се в не за е от с че са по като това които но ще към",
        "ru": "и в не на что я с он как это по но они мы из у за так же только для или к",
        "uk": "і в не на що я з він як це та до але від за так є ми у або й",
    },
    "ARABIC": {
        "ar": "في من على إلى أن هذا التي الذي لا ما عن مع هو هي كان أو ثم هذه",
        "fa": "و در به از که این را با است آن برای یک می تا بر هم شد هر",
        "ur": "کے میں کی ہے اور سے کا کو پر یہ نے ہیں بھی اس کہ ایک",
    },
    "DEVANAGARI": {
        "hi": "के है में की और से का को पर यह हैं भी एक ने नहीं तो हो था कि",
        "mr": "आहे आणि च्या ते या मध्ये हे नाही होते तो एक आहेत पण जे हा व",
        "ne": "छ र यो हो पनि छन् लागि गर्न तथा भने एक थियो गर्ने हुन् हुन्छ तर",
    },
    **{"BENGALI": {"bn": ""}, "GUJARATI": {"gu": ""}, "GURMUKHI": {"pa": ""}, "HANGUL": {"ko": ""}},
    **{"HEBREW": {"he": ""}, "KANNADA": {"kn": ""}, "MALAYALAM": {"ml": ""}, "TAMIL": {"ta": ""}},
    **{"TELUGU": {"te": ""}, "THAI": {"th": ""}},
}
"""Script (as the Unicode names of its letters begin) → language written in it (ISO 639-1) → its frequent words."""
_LANGUAGES: frozenset[str] = frozenset(code for languages in _STOP_WORDS.values() for code in languages)
_SCRIPT_SHARE = 2 / 3  # names and terms may stay in another script; a second text in it may not
_FEWEST_HITS = 2  # one stop word is often a word of another language too: the English "die"


def _spoken(text: str) -> frozenset[str]:
    """Every language the text may be in, as far as script and stop words tell; empty when no script prevails.

    At least two thirds of the letters decide the script. Among its languages, those with the most stop words remain;
    all of them where fewer than two stop words were found.

    Limits: a language that is not in the table is taken for one of its script that is (Danish may pass for Dutch,
    Marathi prose short of stop words for Hindi). A language that has its script to itself here is told by that alone.
    A mixture within one script counts as its larger part, and a few words of verse or a list may stay undecided.
    """
    scripts = Counter(unicodedata.name(c, "?").split()[0] for c in unicodedata.normalize("NFC", text) if c.isalpha())
    script, letters = scripts.most_common(1)[0] if scripts else ("?", 0)
    languages = _STOP_WORDS.get(script, {})
    if letters < _SCRIPT_SHARE * scripts.total():
        return frozenset()
    # not \w+: that would cut words at the vowel signs of Indic scripts
    words = Counter(re.split(r"[\s.,;:!?…\"'’‘“”«»()\[\]*_।،؛؟–—]+", unicodedata.normalize("NFC", text).casefold()))
    hits = {code: sum(words[word] for word in stops.split()) for code, stops in languages.items()}
    most = max(hits.values(), default=0)
    return frozenset(code for code, count in hits.items() if most < _FEWEST_HITS or count == most)


_WORD = re.compile(r"\w+")  # "don't" is two, as in the published figures
_FULL_STOPS = re.compile(r"[。！？।॥؟۔]+")  # these end a sentence whether a space follows or not
_ENDED = re.compile(r".*[.!?…][\"'’”»)\]*_]*")
_ABBREVIATION = re.compile(r"\W*(?:(?i:mr|mrs|ms|dr|prof|st|vs|e\.g|i\.e|(?:[a-z]\.)+[a-z])|[A-HJ-Z])\.")


def _sentences(text: str) -> int:
    """How many sentences: runs with a letter, up to a word that ends in ``.``, ``!``, ``?`` or ``…`` or to the end.

    Closing quotes, brackets and emphasis may follow the mark. Titles, initials and dotted abbreviations end none. A
    line break ends none either, but the number of a list item does, so each item counts.

    Limits: an abbreviation at a sentence's end hides that end; Thai, which marks none, is one sentence.

    >>> _sentences('Dr. J. Doe asked: "Is 3.5 enough?" It was... 1. Salt 2. Oil'), _sentences("No. Yes! What?!")
    (4, 3)
    """
    count, is_open = 0, False
    for token in _FULL_STOPS.sub(". ", text).split():
        is_open = is_open or any(c.isalpha() for c in token)
        if is_open and _ENDED.fullmatch(token) and not _ABBREVIATION.fullmatch(token):
            count, is_open = count + 1, False
    return count + is_open


def _parts(pieces: Sequence[str]) -> list[str]:
    """Texts between dividers; a divider may also open or close the reply, but two never meet: then there are none."""
    texts = [piece.strip() for piece in pieces]
    texts = texts if texts[0] else texts[1:]
    texts = texts if texts and texts[-1] else texts[:-1]
    return texts if all(texts) else []


def _starts_paragraph(reply: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = [piece.strip() for piece in reply.split("\n\n") if piece.strip()]
    if len(paragraphs) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    found = re.match(r"[\"'“‘]*([^\s.,:;?!\"'“”‘’]+)", paragraphs[nth_paragraph - 1])
    return found is not None and found[1].lower() == _bare(first_word)


_DIVIDER = re.compile(r"(?<!\*)\*{3}(?!\*)")
_HIGHLIGHT = re.compile(r"(?<!\*)(\*{1,3})(?=[^\s*])[^*\n]*(?<=[^\s*])\1(?!\*)")
_BULLET = re.compile(r"^[ \t]*[*-][ \t]+.*\w", re.MULTILINE)  # a word in it, so that a rule like * * * is none
_PLACEHOLDER = re.compile(r"\[(?=[ \t]*[^\s\[\]])[^\[\]\n]+\]")
_TITLE = re.compile(r"<<[ \t]*[^\s<>][^\n]*?>>")
_CAPITALISABLE = re.compile(r"\w+(?:[.'’&-]\w+)*")
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _has_postscript(reply: str, postscript_marker: str) -> bool:
    """The marker in either case, with or without spaces between its letters, and not within a longer one."""
    letters = [re.escape(letter) for letter in postscript_marker.lower().replace(".", " ").split()]
    end = r"\." if postscript_marker.rstrip().endswith(".") else ""
    return bool(re.search(r"(?<![\w.])" + r"\.\s?".join(letters) + end + r"(?!\w)", reply.lower()))


def _has_sections(reply: str, num_sections: int, section_spliter: str) -> bool:
    return len(re.findall(rf"(?<!\w){re.escape(section_spliter.strip())}\s?\d+", reply)) >= num_sections


def _is_json(reply: str) -> bool:
    bare = re.sub(r"\A```(?:json)?|```\Z", "", reply.strip(), flags=re.IGNORECASE)
    try:
        json.loads(bare)
    except (ValueError, RecursionError):  # a model in a loop can open thousands of brackets
        return False
    return True


def _gives_two(reply: str) -> bool:
    answers = _parts(reply.split("******"))
    return len(answers) == 2 and answers[0] != answers[1]


def _capitals(text: str) -> int:
    return sum(word.isupper() for word in _CAPITALISABLE.findall(text))


def _counted(count: Callable[[str], int]) -> Callable[..., bool]:
    return lambda reply, wanted, relation: _holds(count(reply), wanted, relation)


def _has(pattern: re.Pattern[str]) -> Callable[..., bool]:
    return lambda reply, n=1: len(pattern.findall(reply)) >= n


INSTRUCTIONS: dict[str, tuple[Callable[..., bool], str]] = {
    "change_case:capital_word_frequency": (_counted(_capitals), "capital_frequency capital_relation"),
    # a short English line has few stop words: only another language's speak against it
    "change_case:english_capital": (lambda reply: reply.isupper() and "en" in _spoken(reply), ""),
    "change_case:english_lowercase": (lambda reply: reply.islower() and "en" in _spoken(reply), ""),
    "combination:repeat_prompt": (lambda reply, text: _bare(reply).startswith(_bare(text)), "prompt_to_repeat"),
    "combination:two_responses": (_gives_two, ""),
    "detectable_content:number_placeholders": (_has(_PLACEHOLDER), "num_placeholders"),
    "detectable_content:postscript": (_has_postscript, "postscript_marker"),
    "detectable_format:constrained_response": (lambda reply: any(answer in reply for answer in _ANSWERS), ""),
    "detectable_format:json_format": (_is_json, ""),
    "detectable_format:multiple_sections": (_has_sections, "num_sections section_spliter"),
    "detectable_format:number_bullet_lists": (lambda reply, n: len(_BULLET.findall(reply)) == n, "num_bullets"),
    "detectable_format:number_highlighted_sections": (_has(_HIGHLIGHT), "num_highlights"),
    "detectable_format:title": (_has(_TITLE), ""),
    "keywords:existence": (lambda reply, words: all(_occurrences(word, reply) for word in words), "keywords"),
    "keywords:forbidden_words": (_avoids, "forbidden_words"),
    "keywords:frequency": (_repeats, "keyword frequency relation"),
    "keywords:letter_frequency": (_repeats, "letter let_frequency let_relation"),
    # what is undecided was not shown to be that language
    "language:response_language": (lambda reply, language: _spoken(reply) == {language}, "language"),
    "length_constraints:nth_paragraph_first_word": (_starts_paragraph, "num_paragraphs nth_paragraph first_word"),
    "length_constraints:number_paragraphs": (
        lambda reply, n: len(_parts(_DIVIDER.split(reply))) == n,
        "num_paragraphs",
    ),
    "length_constraints:number_sentences": (_counted(_sentences), "num_sentences relation"),
    "length_constraints:number_words": (_counted(lambda reply: len(_WORD.findall(reply))), "num_words relation"),
    "punctuation:no_comma": (lambda reply: "," not in reply, ""),
    "startend:end_checker": (lambda reply, end: _bare(reply.strip().strip('"')).endswith(_bare(end)), "end_phrase"),
    "startend:quotation": (lambda reply: bool(re.fullmatch(r'\s*".*"\s*', reply, re.DOTALL)), ""),
}
"""Instruction id → what checks a reply, and the names of the keyword arguments it takes after the reply. All are
required but ``prompt_to_repeat``."""
