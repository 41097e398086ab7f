"""What a user could take instead of the heads, trained on the same rows and labels: TF-IDF and MiniLM embeddings with
logistic regression, and packages that classify out of the box."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import FeatureUnion

from hhh_router.data.examples import Example
from hhh_router.errors import BackendError, HHHRouterError
from hhh_router.training.mix import draw
from hhh_router.training.recipe import load_recipe
from hhh_router.types import NEEDS, OUTCOMES, ReadRequest

if TYPE_CHECKING:
    from hhh_router.model.embed import SentenceEncoder

HEADS: tuple[str, ...] = (*NEEDS, *OUTCOMES)
_TEXT_CHARACTERS = 4000  # longer texts are cut, about as the heads' are
_EMBEDDED_ROWS = 8_000  # rows per head that embeddings are trained on, evenly spaced: they saturate early
Labelled = tuple[list[str], list[int], list[float]]


class TfidfDetector:
    """Word and character n-grams, one balanced logistic regression a head."""

    name = "TF-IDF + logistic"

    def __init__(self, models: Mapping[str, tuple[FeatureUnion, LogisticRegression]]) -> None:
        self._models = models
        self.heads = frozenset(models)

    @classmethod
    def train(cls, examples: Sequence[Example], heads: Sequence[str] = HEADS) -> Self:
        """Fit one model a head on the rows that label it; heads with one class only are left out."""
        models = {}
        for head in heads:
            texts, labels, weights = labelled(examples, head)
            if len(set(labels)) < 2:
                continue
            vectorizer = FeatureUnion(
                [
                    ("words", TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, max_features=60_000)),
                    ("letters", TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), min_df=3, sublinear_tf=True,
                                                max_features=60_000)),
                ]
            )  # fmt: skip
            model = LogisticRegression(C=4.0, max_iter=300, class_weight="balanced")
            model.fit(vectorizer.fit_transform(texts), labels, sample_weight=weights)
            models[head] = (vectorizer, model)
        return cls(models)

    def probabilities(self, texts: Sequence[ReadRequest], head: str) -> list[float]:
        """P(head) of each text."""
        vectorizer, model = self._models[head]
        given = vectorizer.transform([flat(t, head) for t in texts])
        return [float(p) for p in model.predict_proba(given)[:, 1]]


class MiniLMDetector:
    """all-MiniLM-L6-v2 embeddings, one balanced logistic regression a head."""

    name = "MiniLM + logistic"

    def __init__(self, encoder: SentenceEncoder, models: Mapping[str, LogisticRegression]) -> None:
        self._encoder = encoder
        self._models = models
        self.heads = frozenset(models)

    @classmethod
    def train(cls, examples: Sequence[Example], heads: Sequence[str] = HEADS) -> Self:
        """Fit one model a head; a text is embedded once for all heads.

        Raises:
            BackendError: The package with the model is not installed.
        """
        from hhh_router.model.embed import SentenceEncoder  # torch: the other baselines do without

        encoder = SentenceEncoder.minilm()
        rows = {head: _spaced(labelled(examples, head)) for head in heads}
        known: dict[str, np.ndarray] = {}
        every = list(dict.fromkeys(t for texts, _, _ in rows.values() for t in texts))
        known = dict(zip(every, encoder.embed(every).numpy(), strict=True))
        models = {}
        for head, (texts, labels, weights) in rows.items():
            if len(set(labels)) == 2:
                model = LogisticRegression(C=10.0, max_iter=500, class_weight="balanced")
                models[head] = model.fit(np.stack([known[t] for t in texts]), labels, sample_weight=weights)
        return cls(encoder, models)

    def probabilities(self, texts: Sequence[ReadRequest], head: str) -> list[float]:
        """P(head) of each text."""
        vectors = self._encoder.embed([flat(t, head) for t in texts]).numpy()
        return [float(p) for p in self._models[head].predict_proba(vectors)[:, 1]]


class JailguardDetector:
    """The package ``jailguard``, as it comes, for injections."""

    name = "jailguard"
    heads = frozenset({"injection"})

    def probabilities(self, texts: Sequence[ReadRequest], head: str) -> list[float]:
        """P(injection) of each text, as the package says it.

        Raises:
            BackendError: It is not installed, or cannot load its model.
        """
        if find_spec("jailguard") is None:
            raise BackendError("not available: the package jailguard is not installed", hint="pip install jailguard")
        package: Any = import_module("jailguard")
        try:
            package.download_model()  # where its model cannot be had, this raises; detect() would panic
            return [float(package.detect(flat(t, head)).score) for t in texts]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # whatever it raises means no figure; a panic of its Rust is no Exception
            raise BackendError(f"not available: {type(error).__name__}: {error}") from error


def train_baselines(
    recipe: Path, data: Path, heads: Sequence[str], *, on_progress: Callable[[str, int, int, str], None]
) -> tuple[Any, ...]:
    """Every baseline that is installed, trained on a recipe's router rows.

    Args:
        recipe: The recipe of the bundle that is measured beside them.
        data: Folder of data sets.
        heads: What they are trained for. The rows are drawn by the recipe's seed; the models have no randomness.
        on_progress: Told stage, done, total, note.
    """
    loaded, _ = load_recipe(recipe)
    examples = draw(loaded.router.mix, data, seed=loaded.seed)
    found: list[Any] = []
    makers: Sequence[Callable[[], Any]] = (
        lambda: TfidfDetector.train(examples, heads),
        lambda: MiniLMDetector.train(examples, heads),
        JailguardDetector,
    )
    for number, make in enumerate(makers, start=1):
        try:
            found.append(make())
            note = found[-1].name
        except HHHRouterError as error:
            note = f"left out: {error.message}"
        on_progress("baselines", number, len(makers), note)
    return tuple(found)


def labelled(examples: Sequence[Example], head: str) -> Labelled:
    """Texts, labels and weights of the rows that label a head; a need is learned from the prompt, once per prompt."""
    kind = "needs" if head in NEEDS else "outcomes"
    rows: dict[str, tuple[int, float]] = {}
    for e in examples:
        known = getattr(e, kind)
        if head in known and (kind == "outcomes" or not e.answer_side):
            request = ReadRequest(messages=e.messages, response=e.response)
            rows[flat(request, head)] = (int(known[head]), e.weight)
    return list(rows), [label for label, _ in rows.values()], [weight for _, weight in rows.values()]


def flat(request: ReadRequest, head: str) -> str:
    """The text a baseline sees: the last turn for needs, prompt and response for outcomes."""
    prompt = request.messages[-1].content if request.messages else ""
    if head in NEEDS or request.response is None:
        return prompt[:_TEXT_CHARACTERS]
    return f"{prompt[: _TEXT_CHARACTERS // 2]}\n\n{request.response[:_TEXT_CHARACTERS]}"


def _spaced(rows: Labelled) -> Labelled:
    step = max(1, -(-len(rows[0]) // _EMBEDDED_ROWS))
    texts, labels, weights = rows
    return texts[::step], labels[::step], weights[::step]
