"""Replies that keep to each instruction and replies that do not, and figures that can be counted by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hhh_router.data.examples import data_hash
from hhh_router.errors import DataError
from hhh_router.evaluation.ifeval import IFEVAL, INSTRUCTIONS, IFEvalRow, follows, ifeval_figures, read_ifeval

AT_LEAST, LESS = "at least", "less than"
PARAGRAPH = {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "elm"}

# id, kwargs, replies that follow it, replies that do not
CASES = [
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": AT_LEAST},
        ["This is VERY, VERY nice.", "I see WELL-KNOWN people.", "NASA’S A4 is 1."],
        ["This is VERY nice.", "WELL-KNOWN, so one word", "Title Case Alone 12 34"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": LESS},
        ["Only ONE.", "none"],
        ["ONE and TWO."],
    ),
    (
        "change_case:english_capital",
        {},
        ["THE CAT IS IN THE HOUSE, AND IT IS 9 O'CLOCK.", "MEOW!", "DIE HARD"],
        ["The CAT IS IN THE HOUSE.", "DER HUND UND DIE KATZE SIND NICHT IM HAUS.", "КОТ НЕ ДОМА И ОН СПИТ.", "42"],
    ),
    (
        "change_case:english_lowercase",
        {},
        ["the cat is in the house, and it is 9 o'clock.", "meow!"],
        ["The cat is in the house.", "der hund und die katze sind nicht im haus.", "कुत्ता घर में है", "..."],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Name a river."},
        ["Name a river.\n\nThe Rhine.", "  name a RIVER. The Rhine."],
        ["Sure! Name a river. The Rhine.", "Name one river.", "The Rhine."],
    ),
    (
        "combination:two_responses",
        {},
        ["One.\n******\nTwo.", "******\nOne.\n******\nTwo.\n******"],
        [
            "One.",
            "One.\n******\nOne.",
            "One.\n******\n******\nTwo.",
            "A ****** B ****** C",
            "One.\n***\nTwo.",
            "******",
        ],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["Dear [name], at [street address].", "[a][b][c]"],
        ["Dear [name].", "[name] []", "[name] [ ]", "[name] [two\nlines]"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Bye.\n\nP.S. Bring cake.", "Bye. p. s. Bring cake.", "**P.S.** Cake."],
        ["Bye. PS: cake.", "Bye. P.P.S. Cake.", "Bye. P.S cake.", "Soap.s."],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["Bye.\nP.P.S. Bring cake.", "Bye.\nP.P.S Bring cake.", "Bye.\np. p. s bring cake."],
        ["Bye.\nP.S. Bring cake.", "Bye. PPS cake.", "P.P.Soon"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "Let me think. My answer is maybe. Truly.", '"My answer is no."'],
        ["Yes.", "My answer is yes", "my answer is no.", "My answer is that it depends."],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1, null]}', '```json\n{"a": 1}\n```', '```\n["a"]\n```', '  ```JSON\n{"a": 1}```\n'],
        ["{'a': 1}", 'Here you go: {"a": 1}', '{"a": 1', "```json\n```", "[" * 100_000],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        [
            "SECTION 1\nOne.\n\nSECTION 2\nTwo.",
            "**SECTION 1:** a\n**SECTION 2:** b\n**SECTION 3:** c",
            "SECTION1 SECTION2",
        ],
        ["SECTION 1\nOne.", "Section 1\nOne.\nSection 2\nTwo.", "SECTION A\nSECTION B", "SUBSECTION 1 SUBSECTION 2"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        [
            "* Milk\n* Eggs",
            "To buy:\n - Milk\n\t- **Eggs**\n---\nThat is all.",
            "* Milk\n*emphasis* begins a line\n* Eggs",
        ],
        ["* Milk", "* Milk\n* Eggs\n* Tea", "1. Milk\n2. Eggs", "Milk * Eggs - Tea", "* Milk\n* * *"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*one* and *two words*", "**one**, **two**", "* *one* in a list\n* and ***two***"],
        ["*one* alone", "* one\n* two\n* three", "** one ** and *two*", "**** and ** **", "*one\ntwo* *three*"],
    ),
    (
        "detectable_format:title",
        {},
        ["<<A title>>\nText.", "Text << A > B >>."],
        ["A title", "<A>", "<<>>", "<< \n a>>", "<<a"],
    ),
    (
        "keywords:existence",
        {"keywords": ["mom", "tea"]},
        ["Moms like TEA.", "tea, mom"],
        ["Mom likes coffee.", "Dad likes tea.", "nothing"],
    ),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["key", "a.b"]},
        ["Monkeys keyed it.", "axb", "nothing"],
        ["The Key is lost.", "key", "It is a.b."],
    ),
    (
        "keywords:frequency",
        {"keyword": "para", "frequency": 2, "relation": AT_LEAST},
        ["Para, para!", "parallel paragraphs", "para para para"],
        ["para", "none"],
    ),
    (
        "keywords:frequency",
        {"keyword": "no", "frequency": 2, "relation": LESS},
        ["No.", "yes"],
        ["No, no.", "Know nothing"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "E", "let_frequency": 3, "let_relation": AT_LEAST},
        ["Eleven", "eee"],
        ["ever", "none"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 2, "let_relation": LESS},
        ["#one", "none"],
        ["#one #two"],
    ),
    (
        "language:response_language",
        {"language": "pt"},
        ["O gato não está em casa, mas os cães estão na rua e um deles é meu."],
        [
            "El gato no está en la casa, pero los perros están en la calle y uno de ellos es mío.",
            "The cat is not in the house, but the dogs are on the street and one of them is mine.",
            "Gato.",
            "42",
            "O gato não está em casa, mas os cães estão na rua. Кот не дома, а собаки на улице и одна из них моя.",
        ],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        PARAGRAPH,
        ["Oak it is.\n\nElm, it was.", 'Oak.\n\n"Elm" it was.', "\n\nOak.\n\n\n\nelm!\n\n"],
        ["Elm.", "Elm.\n\nOak.", "Oak.\n\nElms.", "Oak.\n\nElm.\n\nYew.", "Oak.\nElm.", "Oak.\n\n***"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["One.\n***\nTwo.", "One.\n\nStill one.\n\n***\n\nTwo.", "***\nOne.\n***\nTwo.\n***", "One. *** Two."],
        ["One.\n\nTwo.", "One.\n***\nTwo.\n***\nThree.", "One.\n***\n***\nTwo.", "One.\n******\nTwo.", "***"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": AT_LEAST},
        [
            "One. Two! Three?",
            "He said: “No!” Then he left. The end",
            "1. Salt\n2. Oil\n3. Rice",
            "यह एक है। यह दो है। यह तीन।",
        ],
        ["One. Two.", "Dr. J. R. Doe met Mrs. Roe at 3.5 e.g. here. The end", "1. 2. 3. Go", "One, two; three"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": LESS},
        ["Only one.", "Only one"],
        ["One. Two.", "**One.** (Two.)"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": AT_LEAST},
        ["one two three four", "One, two; three-four!", "Don't go there."],
        ["one two three", "- - - - -"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS}, ["one two"], ["one two three"]),
    ("punctuation:no_comma", {}, ["No comma here."], ["Well, one."]),
    (
        "startend:end_checker",
        {"end_phrase": "So what is next?"},
        ["It is done. So what is next?", '"Done. so what is next? "\n'],
        ["So what is next? Nothing.", "So what is next", "Done."],
    ),
    (
        "startend:quotation",
        {},
        ['"Hello\nthere"', ' "a" and "b" \n'],
        ["Hello", '"Hello', 'Hello"', '"', "“Hello”", "'Hello'"],
    ),
]

SENTENCES = {
    "ar": "يولد جميع الناس أحرارا وهم متساوون في الكرامة و من حقهم أن يعيشوا مع بعضهم على هذا الأساس",
    "bg": "Всички хора се раждат свободни и равни по достойнство. Те са надарени с разум и трябва да са като братя.",
    "de": "Alle Menschen sind frei und gleich an Würde geboren. Sie sollen einander im Geist der Liebe begegnen.",
    "en": "All human beings are born free, and they should act towards one another in a spirit of friendship.",
    "es": "Todos los seres humanos nacen libres y deben comportarse como hermanos los unos con los otros.",
    "fa": "تمام افراد بشر آزاد به دنیا می آیند و از نظر حقوق با هم برابرند و باید با یکدیگر برادر باشند",
    "fi": "Kaikki ihmiset syntyvät vapaina, ja heille on annettu järki niin että he voivat toimia kuin veljet.",
    "fr": "Tous les êtres humains naissent libres et doivent agir les uns avec les autres dans la fraternité.",
    "gu": "બધા મનુષ્યો જન્મથી સ્વતંત્ર છે અને સમાન અધિકાર ધરાવે છે.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता है। यह सब की बात है।",
    "it": "Tutti gli esseri umani nascono liberi e uguali per dignità. Essi devono agire con spirito di fratellanza.",
    "kn": "ಎಲ್ಲಾ ಮಾನವರೂ ಸ್ವತಂತ್ರರಾಗಿಯೇ ಜನಿಸಿದ್ದಾರೆ ಮತ್ತು ಸಮಾನರು.",
    "ko": "모든 인간은 태어날 때부터 자유로우며 존엄과 권리에 있어 동등하다.",
    "mr": "सर्व माणसे जन्मतः स्वतंत्र आहेत आणि ते समान आहेत. हे सत्य आहे पण ते सोपे नाही.",
    "ne": "सबै मानिस जन्मैदेखि स्वतन्त्र छन् र समान पनि छन्। यो सबैको लागि हो।",
    "nl": "Alle mensen worden vrij en gelijk geboren. Zij zijn met verstand begaafd en het is niet te veel gevraagd.",
    "pl": "Wszyscy ludzie rodzą się wolni i równi. Są oni obdarzeni rozumem i nie jest to przypadek.",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade. São dotados de razão e não podem esquecer.",
    "ru": "Все люди рождаются свободными и равными в своём достоинстве. Это так, и мы не спорим, что они братья.",
    "sw": "Watu wote wamezaliwa huru na ni sawa kwa hadhi. Hii ni haki ya kila mtu katika dunia.",
    "ta": "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.",
    "te": "మానవులందరూ స్వతంత్రులుగా జన్మించారు మరియు సమానులు.",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "uk": "Всі люди народжуються вільними і рівними у своїй гідності. Це так, і ми не сперечаємося, що вони брати.",
    "ur": "تمام انسان آزاد پیدا ہوئے ہیں اور یہ سب کے لیے ہے کہ وہ بھائی بن کر رہیں",
    "vi": "Mọi người sinh ra được tự do và bình đẳng. Đó là quyền của những người này và không có ngoại lệ.",
}


def row(*instructions, prompt="Do it."):
    return IFEvalRow(prompt, instructions)


NO_COMMA = ("punctuation:no_comma", {})
TITLE = ("detectable_format:title", {})
ONE_HIGHLIGHT_LESS = ("keywords:letter_frequency", {"letter": "*", "let_frequency": 1, "let_relation": LESS})


@pytest.mark.parametrize(("name", "kwargs", "good", "_"), CASES)
def test_replies_that_keep_to_an_instruction_follow_it(name, kwargs, good, _):
    assert [reply for reply in good if not follows(name, kwargs, "Do it.", reply)] == []


@pytest.mark.parametrize(("name", "kwargs", "_", "bad"), CASES)
def test_replies_that_break_an_instruction_do_not_follow_it(name, kwargs, _, bad):
    assert [reply for reply in bad if follows(name, kwargs, "Do it.", reply)] == []


def test_every_instruction_has_replies_of_both_kinds():
    covered = {name for name, _, good, bad in CASES if good and bad}

    assert covered == set(INSTRUCTIONS)


@pytest.mark.parametrize(("name", "kwargs", "_", "__"), CASES)
def test_an_empty_reply_follows_nothing(name, kwargs, _, __):
    assert not follows(name, kwargs, "Do it.", "")
    assert not follows(name, kwargs, "Do it.", " \n\t")


@pytest.mark.parametrize("language", SENTENCES)
def test_a_sentence_is_in_its_own_language_and_in_no_other(language):
    told = [
        code for code in SENTENCES if follows("language:response_language", {"language": code}, "", SENTENCES[language])
    ]

    assert told == [language]


def test_a_few_foreign_names_do_not_change_the_language():
    reply = "모든 인간은 태어날 때부터 자유로우며 존엄과 권리에 있어 동등하다고 Yoda는 말했다."

    assert follows("language:response_language", {"language": "ko"}, "", reply)


def test_the_prompt_is_repeated_where_the_arguments_name_no_part_of_it():
    assert follows("combination:repeat_prompt", {}, "Name a river.", "Name a river. The Rhine.")
    assert not follows("combination:repeat_prompt", {}, "Name a river.", "The Rhine.")


def test_arguments_that_are_none_count_as_not_given():
    assert follows("punctuation:no_comma", {"num_words": None}, "", "No comma.")


@pytest.mark.parametrize(
    ("name", "kwargs", "says"),
    [
        ("punctuation:no_colon", {}, "unknown instruction 'punctuation:no_colon'"),
        ("punctuation:no_comma", {"limit": 3}, "punctuation:no_comma: limit is unknown"),
        ("keywords:existence", {}, "keywords:existence: keywords is missing"),
        ("keywords:existence", {"keywords": None}, "keywords is missing"),
        ("keywords:existence", {"keywords": "mom"}, "keywords is 'mom', not a list of texts"),
        ("keywords:existence", {"keywords": []}, "not a list of texts"),
        ("keywords:forbidden_words", {"forbidden_words": [""]}, "not a list of texts"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "about"}, "relation is 'about'"),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 0}, "num_paragraphs is 0"),
        ("length_constraints:number_paragraphs", {"num_paragraphs": True}, "num_paragraphs is True"),
        ("length_constraints:number_paragraphs", {"num_paragraphs": "3"}, "num_paragraphs is '3'"),
        ("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": LESS}, "letter is 'ab'"),
        ("language:response_language", {"language": "tlh"}, "language is 'tlh'"),
        ("startend:end_checker", {"end_phrase": " "}, "end_phrase is ' ', not a text"),
    ],
)
def test_an_unknown_id_or_a_bad_argument_is_named(name, kwargs, says):
    with pytest.raises(DataError) as error:
        follows(name, kwargs, "Do it.", "Done.")

    assert says in error.value.message
    assert name in error.value.message


def test_a_row_refuses_instructions_it_could_not_judge_later():
    with pytest.raises(DataError, match="without instructions"):
        row()
    with pytest.raises(DataError, match="num_words is missing"):
        row(("length_constraints:number_words", {"relation": LESS}))


def test_strict_figures_count_prompts_and_instructions():
    rows = [row(NO_COMMA, TITLE), row(NO_COMMA), row(NO_COMMA, TITLE)]
    replies = ["<<Yes>> fine", "Well, no", "no title"]

    found = ifeval_figures(rows, replies, seed=1)

    assert (found["n"], found["instructions_n"], found["seed"]) == (3, 5, 1)
    assert found["prompt_strict"] == pytest.approx(1 / 3)
    assert found["instruction_strict"] == pytest.approx(3 / 5)
    assert (found["prompt_loose"], found["instruction_loose"]) == (found["prompt_strict"], found["instruction_strict"])
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("instruction", "reply"),
    [
        (NO_COMMA, "Sure, here:\nA line."),
        (NO_COMMA, "A line.\nBye, then."),
        (NO_COMMA, "Sure, here:\nA line.\nBye, then."),
        (ONE_HIGHLIGHT_LESS, "A *line*."),
        (("startend:quotation", {}), 'Sure:\n\n**"A line."**\n\nBye.'.replace("\n\n", "\n")),
    ],
)
def test_a_loose_reading_forgives_the_first_line_the_last_line_and_asterisks(instruction, reply):
    found = ifeval_figures([row(instruction)], [reply], seed=1)

    assert (found["prompt_strict"], found["prompt_loose"]) == (0.0, 1.0)
    assert (found["instruction_strict"], found["instruction_loose"]) == (0.0, 1.0)


def test_a_loose_reading_forgives_nothing_else():
    found = ifeval_figures([row(NO_COMMA), row(NO_COMMA)], ["A, line.", "a\nb\nc, d\ne\nf"], seed=1)

    assert found["instruction_loose"] == 0.0


def test_intervals_resample_prompts_and_repeat_with_the_seed():
    rows = [row(NO_COMMA, TITLE), row(NO_COMMA)] * 20
    replies = ["plain", "plain", "<<a>>", "a, b"] * 10
    kept, asked = np.array([1, 1, 2, 0] * 10), np.array([2, 1] * 20)
    rng = np.random.default_rng(99)
    draws = rng.integers(0, 40, (4000, 40))
    expected = np.quantile(kept[draws].sum(1) / asked[draws].sum(1), [0.025, 0.975])

    found = ifeval_figures(rows, replies, seed=5)

    assert found["instruction_strict_interval"] == pytest.approx(expected, abs=0.03)
    assert found == ifeval_figures(rows, replies, seed=5)
    other = ifeval_figures(rows, replies, seed=6)
    assert found["instruction_strict_interval"] != other["instruction_strict_interval"]
    assert found["prompt_strict_interval"][0] < found["prompt_strict"] < found["prompt_strict_interval"][1]


def test_the_data_hash_names_prompts_and_instructions_and_not_replies():
    def digest(rows, reply="a"):
        return ifeval_figures(rows, [reply] * len(rows), seed=1)["data_sha256"]

    base = digest([row(NO_COMMA)])

    assert base == digest([row(NO_COMMA)], reply="b")
    assert len({base, digest([row(TITLE)]), digest([row(NO_COMMA, prompt="Other.")]), data_hash([])}) == 4


@pytest.mark.parametrize(("rows", "replies"), [([], []), ([row(NO_COMMA)], []), ([row(NO_COMMA)], ["a", "b"])])
def test_figures_need_one_reply_per_row(rows, replies):
    with pytest.raises(DataError, match="replies"):
        ifeval_figures(rows, replies, seed=1)


def written(folder, *rows):
    path = folder / IFEVAL
    path.parent.mkdir()
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def raw(**changes):
    known = {"prompt": "Do it.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "split": "eval"}
    return {key: value for key, value in {**known, **changes}.items() if value is not None}


def test_eval_rows_are_read_in_order(tmp_path):
    written(tmp_path, raw(), raw(prompt="Learn.", split="train"), raw(prompt="Again."))

    assert read_ifeval(tmp_path) == [row(NO_COMMA), row(NO_COMMA, prompt="Again.")]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (raw(prompt=None), "no field 'prompt'"),
        (raw(kwargs=[]), "zip"),
        (raw(kwargs=[3]), "'int' object"),
        (raw(instruction_id_list=["nope"]), "unknown instruction 'nope'"),
        (raw(kwargs=[{"num_words": 3}]), "num_words is unknown"),
    ],
)
def test_a_broken_row_is_named_by_file_and_row(tmp_path, broken, says):
    path = written(tmp_path, raw(), broken)

    with pytest.raises(DataError) as error:
        read_ifeval(tmp_path)

    assert error.value.message.startswith(f"{path}:2: ")
    assert says in error.value.message


def test_a_missing_file_says_where_it_was_sought(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_ifeval(tmp_path)
