"""Answers that are read while they grow: each reading is that of the whole text, whatever came before it."""

import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hhh_router.bundle import Bundle
from hhh_router.errors import ContextTooLong, Overloaded, ReaderError
from hhh_router.model.encode import Encoder
from hhh_router.model.engine import ReadStep, SessionLost
from hhh_router.model.growing import GrowingIds
from hhh_router.model.reader import HeadReader
from hhh_router.model.reads import Remembered
from hhh_router.model.sessions import Sessions, StepJob
from hhh_router.model.worker import Worker, open_reader
from hhh_router.settings import Settings
from hhh_router.testing.tiny import tiny_bundle
from hhh_router.types import Message, ReadRequest, Scores

pytestmark = pytest.mark.integration
WINDOW = 1024
PROMPT = (Message(role="system", content="Be brief."), Message(role="user", content="What is the capital of France?"))
ANSWER = (
    "The capital of France is Paris.\n\n  It isn't Lyon, nor 12,345 other places — naïve, 你好，世界。 "
    "See https://example.org/a?b=c&d  \n\n```python\nprint('hello')   # done\n```\t🙂👩‍👩‍👧 e\u0301 end<|im_end|> "
)
PIECES = [
    " ",
    "  ",
    "\n",
    "\n\n",
    "a",
    "the",
    " the",
    "ing",
    "'",
    "'s",
    "1",
    "23",
    ".",
    "...",
    "é",
    "e\u0301",
    "你",
    "，",
    "🙂",
    "\u200d",
]
PIECES += ["<|im_end|>", "<|im_", "end|>", "\t", "\r\n", "aaaaaaaa", " don", "'t", "ﬁ", "\u00a0", "_", "https://"]


class Asked:
    """Sessions of one model, driven turn by turn."""

    def __init__(self, reader: HeadReader, encoder: Encoder, **limits: int) -> None:
        self.reader = reader
        self.encoder = encoder
        self.sessions = Sessions(reader, encoder, Remembered(), **({"batch_tokens": 512, "max_tokens": 4096} | limits))
        self.told: dict[str, str] = {}

    def put(self, name: str, response: str | None, messages: Sequence[Message] | None = None) -> list[object]:
        """Ask without waiting."""
        found: list[object] = []
        told = self.told.get(name, "") if messages is None else ""
        kept = max(n for n in range(len(told) + 1) if told[:n] == (response or "")[:n])
        step = ReadStep(
            session=name,
            opens=None if messages is None else ReadRequest(messages=tuple(messages)),
            kept=kept,
            added=None if response is None else response[kept:],
            digest="",
        )
        if response is not None:
            self.told[name] = response
        self.sessions.put(StepJob(step=step, end=found.append))
        return found

    def finish(self) -> None:
        while self.sessions.busy:
            self.sessions.turn()

    def ask(self, name: str, response: str | None, messages: Sequence[Message] | None = None) -> Scores:
        found = self.put(name, response, messages)
        self.finish()
        (answer,) = found
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, list)
        return answer[0]

    def whole(self, response: str | None, messages: Sequence[Message] = PROMPT) -> Scores:
        """The oracle: one pass over everything."""
        return self.reader.score([self.encoder.encode(ReadRequest(messages=tuple(messages), response=response))])[0]


def same(found: Scores, expected: Scores, within: float = 1e-4) -> None:
    assert (found.mode, found.tokens, found.layers_run) == (expected.mode, expected.tokens, expected.layers_run)
    assert found.needs == pytest.approx(expected.needs, abs=within)
    assert found.outcomes == pytest.approx(expected.outcomes, abs=within)
    assert found.distance == pytest.approx(expected.distance, abs=within, rel=within)


def cuts(text: str, number: int, seed: int) -> list[str]:
    places = sorted(random.Random(seed).sample(range(1, len(text)), number))
    return [text[:p] for p in [*places, len(text)]]


def opened(bundle: Bundle, cache: Path) -> tuple[HeadReader, Encoder]:
    return open_reader(bundle, Settings.load(cache_dir=cache, threads=1, dtype="float32"))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[HeadReader, Encoder]:
    bundle = tiny_bundle(tmp_path_factory.mktemp("tiny"), max_position_embeddings=WINDOW)
    return opened(bundle, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def default_model() -> tuple[HeadReader, Encoder]:
    return open_reader(Bundle.load("smollm2-135m"), Settings.load(threads=1, dtype="float32"))


def test_every_reading_is_that_of_the_whole_text_in_every_family(any_tiny: Bundle, tmp_path: Path) -> None:
    asked = Asked(*opened(any_tiny, tmp_path))

    same(asked.ask("a", None, PROMPT), asked.whole(None))
    for text in cuts(ANSWER, 12, seed=1):
        same(asked.ask("a", text), asked.whole(text))
    asked.sessions.close_session("a")
    longer = (*PROMPT, Message(role="assistant", content=ANSWER), Message(role="user", content="And of Spain?"))
    same(asked.ask("b", None, longer), asked.whole(None, longer))
    same(asked.ask("b", "Madrid", None), asked.whole("Madrid", longer))


@pytest.mark.parametrize("seed", range(3))
def test_every_reading_is_that_of_the_whole_text_on_the_default_model(
    default_model: tuple[HeadReader, Encoder], seed: int
) -> None:
    asked = Asked(*default_model)

    same(asked.ask("a", None, PROMPT), asked.whole(None))
    for text in cuts(ANSWER * 2, 10, seed):
        same(asked.ask("a", text), asked.whole(text), within=1e-3)


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=60))
def test_tokens_of_a_growing_text_are_those_of_the_whole(
    tiny_model: tuple[HeadReader, Encoder], default_model: tuple[HeadReader, Encoder], parts: list[str]
) -> None:
    for encoder in (tiny_model[1], default_model[1]):
        growing, text = GrowingIds(encoder), ""
        for part in parts:
            before, kept = list(growing.ids), len(text)
            text += part
            stayed = growing.become(kept, part)

            assert growing.ids == encoder.response_ids(text)
            assert growing.ids[:stayed] == before[:stayed]


def made(kind: str) -> Encoder:
    """An encoder whose tokenizer splits text as a family's does, its merges learned from a page of this repository."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    alphabet: list[str] = []
    if kind == "llama-2":  # one word: merges may cross spaces, and the first token depends on what stands before
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif kind == "mistral":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    else:  # qwen-2 and llama-3
        words = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
        words += r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    page = (Path(__file__).resolve().parents[2] / "docs" / "engine.md").read_text(encoding="utf-8")
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<unk>", "</s>", *bytes_], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(page.split("\n"), trainer)
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"), 10**6)


@pytest.mark.parametrize("kind", ["llama-2", "gemma", "mistral", "qwen-2"])
def test_tokens_of_a_growing_text_are_those_of_the_whole_however_a_family_splits(kind: str) -> None:
    encoder, draw = made(kind), random.Random(3)
    page = (Path(__file__).resolve().parents[2] / "docs" / "proxy.md").read_text(encoding="utf-8")
    parts = [*PIECES, *page.split(" ")]
    for seed in range(12):
        growing, text = GrowingIds(encoder), ""
        while len(text) < 3000:
            part = (" " if seed % 2 else "").join(draw.choices(parts, k=draw.randint(1, 12)))
            growing.become(len(text), part)
            text += part

            assert growing.ids == encoder.response_ids(text)


@pytest.mark.parametrize("kind", ["llama-2", "gemma", "mistral", "qwen-2", "default"])
def test_only_the_end_of_a_long_text_is_encoded_again(default_model: tuple[HeadReader, Encoder], kind: str) -> None:
    encoder = default_model[1] if kind == "default" else made(kind)
    encoded: list[int] = []
    plain = encoder.plain
    words = random.Random(0).choices([*PIECES, " word", " other"], k=4000)
    growing, text = GrowingIds(encoder), ""
    try:
        encoder.plain = lambda t: (encoded.append(len(t)), plain(t))[1]  # type: ignore[method-assign]
        for start in range(0, len(words), 20):
            part = "".join(words[start : start + 20])
            growing.become(len(text), part)
            text += part
    finally:
        encoder.plain = plain  # type: ignore[method-assign]

    assert growing.ids == encoder.response_ids(text)
    assert sum(encoded) < 6 * len(text)  # from the start each time it would be a hundred times the text


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(st.sampled_from("ab c.\né🙂"), max_size=120), min_size=1, max_size=6))
def test_an_answer_may_take_back_what_it_said(tiny_model: tuple[HeadReader, Encoder], texts: list[str]) -> None:
    asked = Asked(*tiny_model)
    asked.ask("a", "begin", PROMPT)

    for text in texts:
        same(asked.ask("a", text), asked.whole(text))


def test_only_new_tokens_are_read(tiny_model: tuple[HeadReader, Encoder]) -> None:
    asked = Asked(*tiny_model)
    counted = counting(asked)

    prompt = asked.ask("a", None, PROMPT).tokens
    for text in cuts(ANSWER * 3, 20, seed=2):
        last = asked.ask("a", text).tokens

    assert last > prompt + 300
    assert sum(counted) < last + 20 * 4  # the tokens at the cuts, again


def counting(asked: Asked) -> list[int]:
    """Tokens that were run from now on, one number a pass."""
    counted: list[int] = []
    stack = asked.reader.stack
    extend = type(stack).extend

    class Counting(type(stack)):  # type: ignore[misc]
        def extend(self, rows, cache):  # type: ignore[no-untyped-def]
            counted.append(sum(map(len, rows)))
            return extend(self, rows, cache)

    asked.reader = HeadReader(Counting(stack.model), asked.reader.heads, asked.reader.read_layers, 0)
    asked.sessions._reader = asked.reader
    return counted


def test_answers_of_many_are_read_on_together(tiny_model: tuple[HeadReader, Encoder]) -> None:
    asked = Asked(*tiny_model)
    counted = counting(asked)
    prompts = [(Message(role="user", content=f"question {'x' * i}"),) for i in range(8)]
    answers = [cuts(f"{i} {ANSWER}", 3, seed=i) for i in range(8)]

    for step in range(4):
        found = [asked.put(str(i), answers[i][step], None if step else prompts[i]) for i in range(8)]
        asked.finish()

        for i, (scores,) in enumerate(found):
            assert isinstance(scores, list)
            same(scores[0], asked.whole(answers[i][step], prompts[i]))
    assert len(counted) < 24  # 32 steps


def test_a_long_text_takes_several_turns_and_others_come_in_between(tiny_model: tuple[HeadReader, Encoder]) -> None:
    asked = Asked(*tiny_model, batch_tokens=64)
    long = asked.put("long", ANSWER + ANSWER[:100], PROMPT)
    asked.sessions.turn()
    short = asked.put("short", "Paris", PROMPT[1:])
    turns = 0
    while not short:
        asked.sessions.turn()
        turns += 1

    assert not long
    assert turns < 4
    asked.finish()
    same(long[0][0], asked.whole(ANSWER + ANSWER[:100]))  # type: ignore[index]
    same(short[0][0], asked.whole("Paris", PROMPT[1:]))  # type: ignore[index]


def test_a_prompt_that_was_read_before_is_read_with_the_first_window(tiny_model: tuple[HeadReader, Encoder]) -> None:
    asked = Asked(*tiny_model)
    counted = counting(asked)
    first = asked.ask("a", None, PROMPT)
    before = len(counted)

    again = asked.ask("b", None, PROMPT)
    window = asked.ask("b", "Paris, I think")

    assert again == first
    assert len(counted) == before + 1
    same(window, asked.whole("Paris, I think"))


def test_what_is_kept_is_bounded_and_the_one_asked_longest_ago_goes_first(
    tiny_model: tuple[HeadReader, Encoder],
) -> None:
    asked = Asked(*tiny_model, max_tokens=400)
    for name in "abc":
        asked.ask(name, f"{name} is the answer", PROMPT)
    asked.ask("a", "a is the answer, then")
    asked.ask("d", "d is the answer", PROMPT)

    assert asked.sessions.tokens <= 400
    same(asked.ask("a", "a is the answer, then again"), asked.whole("a is the answer, then again"))
    with pytest.raises(SessionLost):
        asked.ask("b", "b is the answer, again")
    same(asked.ask("b", "b is the answer, again", PROMPT), asked.whole("b is the answer, again"))


def test_nothing_is_kept_where_nothing_may_be(tiny_model: tuple[HeadReader, Encoder]) -> None:
    asked = Asked(*tiny_model, max_tokens=0)

    same(asked.ask("a", "Paris", PROMPT), asked.whole("Paris"))

    assert asked.sessions.tokens == 0


def test_what_was_closed_goes_before_what_is_open(tiny_model: tuple[HeadReader, Encoder]) -> None:
    asked = Asked(*tiny_model, max_tokens=400)
    asked.ask("open", "Paris", PROMPT)
    for name in "abcd":
        asked.ask(name, f"{name} is the answer", (Message(role="user", content=f"{name}: a question"),))
        asked.sessions.close_session(name)

    assert asked.sessions.tokens <= 400
    same(asked.ask("open", "Paris, still"), asked.whole("Paris, still"))
    with pytest.raises(SessionLost):
        asked.ask("d", "d is the answer, again")


def test_the_next_turn_begins_where_the_last_one_ended(tiny_model: tuple[HeadReader, Encoder]) -> None:
    asked = Asked(*tiny_model)
    counted = counting(asked)
    asked.ask("first", ANSWER, PROMPT)
    asked.sessions.close_session("first")
    kept = asked.sessions.tokens
    longer = (*PROMPT, Message(role="assistant", content=ANSWER), Message(role="user", content="And of Spain?"))
    before = sum(counted)

    prompt = asked.ask("second", None, longer)
    window = asked.ask("second", "Madrid")

    same(prompt, asked.whole(None, longer))
    same(window, asked.whole("Madrid", longer))
    assert sum(counted) - before < 60 < len(ANSWER) < window.tokens
    assert asked.sessions.tokens < 2 * kept  # it was taken over, not copied


def test_those_who_begin_alike_read_the_beginning_once(tiny_model: tuple[HeadReader, Encoder]) -> None:
    asked = Asked(*tiny_model)
    counted = counting(asked)
    system = Message(role="system", content="You answer questions about geography, and about nothing else. " * 4)
    prompts = [(system, Message(role="user", content=f"{i}: capital?")) for i in range(4)]
    found = [asked.ask(str(i), None, prompts[i]) for i in range(4)]
    windows = [asked.ask(str(i), f"City {i}") for i in range(4)]

    for i in range(4):
        same(found[i], asked.whole(None, prompts[i]))
        same(windows[i], asked.whole(f"City {i}", prompts[i]))
    assert sum(counted) < 2 * windows[0].tokens < sum(s.tokens for s in found)


def test_a_conversation_longer_than_the_window_is_an_error_and_not_a_shorter_reading(
    tiny_model: tuple[HeadReader, Encoder],
) -> None:
    asked = Asked(*tiny_model)
    asked.ask("a", "short", PROMPT)

    with pytest.raises(ContextTooLong) as told:
        asked.ask("a", "short" + "x" * WINDOW)
    with pytest.raises(ContextTooLong) as expected:
        asked.whole("short" + "x" * WINDOW)

    assert str(told.value) == str(expected.value)
    assert asked.sessions.tokens == 0


def test_a_text_that_breaks_the_pass_fails_alone(tiny_model: tuple[HeadReader, Encoder]) -> None:
    asked = Asked(*tiny_model)
    (tilde,) = asked.encoder.response_ids("~")
    asked.reader = HeadReader(asked.reader.stack, asked.reader.heads, asked.reader.read_layers, 0)
    asked.sessions._reader = asked.reader
    stack = asked.reader.stack
    broken = type("Broken", (type(stack),), {"extend": lambda self, rows, cache: fails(self, rows, cache)})

    def fails(self: object, rows: Sequence[Sequence[int]], cache: object) -> object:
        if any(tilde in row for row in rows):
            raise RuntimeError("boom")
        return type(stack).extend(self, rows, cache)  # type: ignore[arg-type]

    asked.reader.stack = broken(stack.model)
    good, bad = asked.put("good", "calm", PROMPT), asked.put("bad", "~", PROMPT)
    asked.finish()

    same(good[0][0], asked.whole("calm"))  # type: ignore[index]
    (error,) = bad
    assert isinstance(error, ReaderError)
    assert "boom" in error.message
    same(asked.ask("good", "calm and on"), asked.whole("calm and on"))
    with pytest.raises(SessionLost):
        asked.ask("bad", "~~")


def test_a_step_that_nobody_waits_for_is_not_read(tiny_model: tuple[HeadReader, Encoder]) -> None:
    asked = Asked(*tiny_model)
    counted = counting(asked)
    found: list[object] = []
    job = StepJob(
        step=ReadStep(session="a", opens=ReadRequest(messages=PROMPT), kept=0, added="x", digest=""), end=found.append
    )
    asked.sessions.put(job)
    job.cancel()
    asked.finish()

    assert found == []
    assert counted == []


def test_more_steps_than_may_wait_are_turned_away(tiny_model: tuple[HeadReader, Encoder]) -> None:
    asked = Asked(*tiny_model, max_waiting=2)
    for name in "ab":
        asked.put(name, "x", PROMPT)

    (error,) = asked.put("c", "x", PROMPT)

    assert isinstance(error, Overloaded)


def test_closing_tells_everyone_once_and_keeps_nothing(tiny_model: tuple[HeadReader, Encoder]) -> None:
    asked = Asked(*tiny_model)
    asked.ask("a", "x", PROMPT)
    found = asked.put("a", "xy")

    asked.sessions.close(ReaderError("closed"))

    assert [str(e) for e in found] == [str(ReaderError("closed"))]
    assert (asked.sessions.tokens, asked.sessions.busy) == (0, False)


def test_answers_texts_and_replies_take_turns() -> None:
    order: list[str] = []
    done = threading.Event()

    class Part:
        """Something that is busy for four turns."""

        def __init__(self, name: str) -> None:
            self.name, self.left, self.waiting = name, 4, 0

        @property
        def busy(self) -> bool:
            return self.left > 0

        def turn(self) -> None:
            if self.busy:
                order.append(self.name)
                self.left -= 1
                if not any(part.busy for part in parts):
                    done.set()

        def close(self, error: Exception) -> None:
            """Nothing is under way."""

    parts = [Part("text"), Part("answer"), Part("reply")]
    worker = Worker(*parts)  # type: ignore[arg-type]
    assert done.wait(10)
    worker.close()

    assert order == ["answer", "reply", "text", "reply", "answer", "reply", "text", "reply", *["answer", "text"] * 2]
