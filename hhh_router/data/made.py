"""Prompts and replies this project writes itself: refusals, and questions nobody can answer as asked.

Public sets of unanswerable questions carry no clear licence, so the default bundle learns that need from these
templates and from TruthfulQA. Templates of the ``train`` and ``calibrate`` parts are different ones, so that a
calibrator does not see the trained wording again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from hhh_router.data.examples import Example, ask

_REFUSAL_OPENERS = (
    "I can't help with that.",
    "I'm not able to help with this request.",
    "I'm sorry, but I can't assist with that.",
    "I won't help with this.",
    "No, I can't help with that.",
    "That is something I can't assist with.",
    "Sorry, I have to decline this one.",
    "I can't provide that.",
)
_REFUSAL_REASONS = (
    "It could cause serious harm to other people.",
    "What you describe could hurt someone and is likely illegal.",
    "Following such advice could put people in danger.",
    "It would be unethical, and people could get hurt.",
    "This could do real damage to others.",
    "It may break the law and cause harm.",
)
_REFUSAL_OFFERS = (
    "If you want, I can explain the risks involved or talk about lawful, safe alternatives.",
    "I'm happy to help with a safe and legal way to reach your goal.",
    "If you or someone else is in danger, please contact local emergency services.",
    "I can instead share information on how to prevent this kind of harm.",
    "If something is troubling you, talking to someone you trust or a professional can help.",
    "Is there something else that I can help you with?",
)

_HOW = re.compile(
    r"\s*how (?:can|do|could|would|should|might) (?:i|one|you|someone|somebody|we|people|a person) (.+?)\??\s*$",
    re.IGNORECASE | re.DOTALL,
)
_INSTRUCTIONS = (
    "Explain how to {}.",
    "Explain step by step how to {}.",
    "Tell me how to {}.",
    "Write a step-by-step guide on how to {}.",
    "Write a tutorial on how to {}.",
    "Give me detailed instructions to {}.",
    "Describe the best way to {}.",
    "List the steps needed to {}.",
)

_HONEST_TRAIN = (
    ("What exactly will the price of {asset} be on {date}?", "Nobody can know the price of {asset} on {date} in advance. Forecasts are guesses, so I would not rely on any exact figure."),
    ("Which {team} will win the championship in {future}?", "That has not happened yet, so nobody knows who will win in {future}."),
    ("What did I have for breakfast on {date}?", "I have no way of knowing what you ate. I cannot see anything about your life beyond what you tell me."),
    ("What am I thinking of right now about {topic}?", "I can't read minds, so I don't know what you are thinking about {topic}."),
    ("Why did {person} invent {impossible}?", "{person} did not invent {impossible}, so there is no reason to give. The question rests on something that is not true."),
    ("In which year did {person} walk on the Moon?", "{person} never walked on the Moon, so there is no such year."),
    ("How many {animal}s are alive in the world at this very second?", "Nobody knows the exact number of {animal}s at this moment. There are only rough estimates."),
    ("Who was the king of {republic} in {future}?", "{future} lies in the future, and {republic} has no king, so I can't name one."),
    ("Summarise the novel '{fake_title}' by {fake_person}.", "I don't know of a novel called '{fake_title}' by {fake_person}, and I would rather not make one up. Could you check the title?"),
    ("What does the {fake_year} study by {fake_person} prove about {topic}?", "I can't find a {fake_year} study by {fake_person} in what I know, so I can't say what it proves about {topic}."),
    ("Why do all doctors agree that {false_claim}?", "Doctors do not agree on that: {false_claim} is not supported by good evidence."),
    ("Since {false_claim}, how should I change my life?", "I would not change anything because of that: it is not true that {false_claim}."),
    ("Tell me the exact date on which {topic} will end.", "Nobody can know that date. I can only describe what is known about {topic} today."),
    ("Is it true that {false_claim}?", "No. There is no good evidence that {false_claim}."),
    ("What is my neighbour's opinion on {topic}?", "I don't know your neighbour, so I can't tell what they think about {topic}."),
    ("How did {person} and {person2} meet on {fake_place}?", "They did not: {fake_place} is not a real place as far as I know, so I can't describe such a meeting."),
)  # fmt: skip
_HONEST_CALIBRATE = (
    ("Give me the winning lottery numbers for {date}.", ""),
    ("What is the home address of the person sitting next to me?", ""),
    ("Explain how {person} discovered {impossible} in the nineteenth century.", ""),
    ("Everyone knows that {false_claim}. What is the scientific explanation?", ""),
    ("Quote the third paragraph of {fake_person}'s essay on {topic}.", ""),
    ("Which day next year will {asset} crash?", ""),
    ("When did {republic} become an island of {fake_place}?", ""),
    ("How often have I laughed about {topic} this week?", ""),
)
_PLAIN_TRAIN = (
    ("What is {topic}?", ""),
    ("Name three facts about {animal}s.", ""),
    ("Who was {person}?", ""),
    ("What is the capital of {republic}?", ""),
    ("How is the price of {asset} measured?", ""),
    ("Write a short poem about {animal}s and {topic}.", ""),
    ("Why do people enjoy {topic}?", ""),
    ("When was {person} born?", ""),
    ("How do scientists estimate how many {animal}s there are?", ""),
    ("What do doctors recommend for a cold?", ""),
    ("Is it true that {animal}s are animals?", ""),
    ("Summarise what is known about {topic} in two sentences.", ""),
)
_PLAIN_CALIBRATE = (
    ("Describe {republic} to a tourist.", ""),
    ("List some books about {topic}.", ""),
    ("What is {person} best known for?", ""),
    ("Where do {animal}s live?", ""),
    ("Explain {topic} to a ten-year-old.", ""),
    ("What moves the market for {asset}?", ""),
)

_FILLERS: dict[str, tuple[str, ...]] = {
    "asset": ("gold", "a barrel of oil", "Bitcoin", "wheat", "silver", "a house in Berlin", "coffee", "natural gas"),
    "date": ("12 March 2041", "the first Monday of 2038", "3 July 2052", "Christmas 2044", "last Tuesday", "May 1st, 2060"),
    "future": ("2043", "2051", "2067", "2080", "2039"),
    "team": ("football club", "chess player", "cricket team", "cyclist", "basketball team"),
    "topic": ("gravity", "medieval trade", "jazz", "photosynthesis", "inflation", "chess openings", "sleep", "climate change", "gardening", "the Roman army", "compilers", "vaccination", "black holes", "democracy"),
    "person": ("Isaac Newton", "Marie Curie", "Leonardo da Vinci", "Ada Lovelace", "Napoleon", "Mozart", "Cleopatra", "Charles Darwin", "Frida Kahlo", "Galileo"),
    "person2": ("Elvis Presley", "Confucius", "Rosa Parks", "Julius Caesar", "Alan Turing"),
    "impossible": ("the smartphone", "the perpetual motion machine", "time travel", "the internet", "the microwave oven", "cold fusion"),
    "animal": ("penguin", "ant", "octopus", "horse", "sparrow", "dolphin", "beetle", "wolf"),
    "republic": ("France", "Brazil", "Finland", "India", "Kenya", "Germany", "Mexico"),
    "fake_title": ("The Glass Meridian", "Seven Ashen Doors", "A Quiet Arithmetic", "Winter of the Ninth Bell"),
    "fake_person": ("Harlan Osterwick", "Mirela Dantov", "Professor J. K. Albrechtsen-Moyo", "Tobias Quellen"),
    "fake_year": ("1987", "2004", "1999", "2013"),
    "fake_place": ("the Isle of Morvanne", "the city of Telquist", "Lake Ossirand", "the planet Vuldar"),
    "false_claim": ("people use only ten percent of their brain", "cracking your knuckles gives you arthritis", "the Great Wall is visible from the Moon", "sugar makes children hyperactive", "lightning never strikes twice in the same place", "goldfish remember nothing for longer than three seconds", "reading in dim light ruins your eyes", "bulls are enraged by the colour red", "hair grows back thicker after shaving", "humans swallow eight spiders a year in their sleep", "the sun is cold inside", "bananas grow on pine trees"),
}  # fmt: skip


def as_instruction(question: str, rng: random.Random) -> str | None:
    """A question of the form "How can I …?" as an instruction; None for any other text.

    >>> as_instruction("How can I bake bread?", random.Random(0))
    'Describe the best way to bake bread.'
    """
    match = _HOW.match(question)
    return rng.choice(_INSTRUCTIONS).format(match[1]) if match else None


def refusal(rng: random.Random) -> str:
    """One refusal: what, why, and what could be done instead."""
    parts = [rng.choice(_REFUSAL_OPENERS)]
    if rng.random() < 0.8:  # a bare "no" is a refusal too
        parts.append(rng.choice(_REFUSAL_REASONS))
    if rng.random() < 0.6:
        parts.append(rng.choice(_REFUSAL_OFFERS))
    return " ".join(parts)


def honest_prompts(split: str, rows: int, seed: int) -> list[Example]:
    """Questions that nobody can answer as asked (honest needed), and as many plain ones of the same subjects.

    Args:
        split: ``train`` (with honest replies) or ``calibrate`` (other templates, no replies).
        rows: Of each kind.
        seed: Of the choice of templates and subjects.
    """
    rng = random.Random(f"{seed}-{split}")
    unanswerable, plain = (_HONEST_TRAIN, _PLAIN_TRAIN) if split == "train" else (_HONEST_CALIBRATE, _PLAIN_CALIBRATE)
    return _made(unanswerable, split, rows, rng, honest=1.0) + _made(plain, split, rows, rng, honest=0.0)


def _made(
    templates: Sequence[tuple[str, str]], split: str, rows: int, rng: random.Random, honest: float
) -> list[Example]:
    made: dict[str, Example] = {}
    for attempt in range(rows * 20):  # subjects repeat, so some draws are duplicates
        if len(made) == rows:
            break
        question, reply = templates[attempt % len(templates)]
        subjects = {name: rng.choice(values) for name, values in _FILLERS.items()}
        prompt = question.format(**subjects)
        made[prompt] = Example(
            source="made",
            split=split,
            messages=ask(prompt),
            response=reply.format(**subjects) or None,
            needs={"honest": honest, "harmless": 0.0, "helpful": 1.0},
            outcomes={"unsafe": 0.0, "untruthful": 0.0, "unhelpful": 0.0} if reply else {},
            group="unanswerable" if honest else "plain",
        )
    return list(made.values())
