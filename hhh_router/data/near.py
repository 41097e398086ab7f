"""Near-duplicates: which texts say nearly the same as some text that must stay unseen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from hhh_router.data.examples import normalise

SHINGLE = 5
"""Characters of one shingle."""
NEAR = 0.5
"""Jaccard similarity of two texts' shingles from which they count as near-duplicates."""
_ROWS = 512  # texts compared with all references at once


def nearest(texts: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """For each text, its greatest Jaccard similarity to any reference, over their sets of 5-character shingles.

    >>> nearest(["How do I paint a boat?", "Name three rivers."], ["how do i paint the boat?"]).round(1).tolist()
    [0.5, 0.0]
    """
    if not texts or not references:
        return np.zeros(len(texts))
    vocabulary: dict[str, int] = {}
    known = _matrix(references, vocabulary)
    asked = _matrix(texts, vocabulary)
    known.resize(known.shape[0], len(vocabulary))
    sizes = np.asarray(known.sum(axis=1)).ravel()
    found = np.zeros(len(texts))
    for start in range(0, len(texts), _ROWS):
        part = asked[start : start + _ROWS]
        shared = (part @ known.T).tocoo()
        own = np.asarray(part.sum(axis=1)).ravel()
        similarity = shared.data / (own[shared.row] + sizes[shared.col] - shared.data)
        np.maximum.at(found, start + shared.row, similarity)
    return found


def _matrix(texts: Sequence[str], vocabulary: dict[str, int]) -> csr_matrix:
    rows, columns = [], []
    for row, text in enumerate(texts):
        for shingle in _shingles(text):
            rows.append(row)
            columns.append(vocabulary.setdefault(shingle, len(vocabulary)))
    return csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(texts), len(vocabulary)))


def _shingles(text: str) -> set[str]:
    plain = normalise(text)
    return {plain[i : i + SHINGLE] for i in range(max(1, len(plain) - SHINGLE + 1))}
