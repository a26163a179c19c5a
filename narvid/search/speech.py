"""What is said, as a third view of a search: how well it fits a query, which windows it brings, what of it is shown.

    z_qs = max(0, z(share) - 2) + max(0, z(cosine) - 2)     of a query and a window in which something is said
      share: of the idf of the query's words, how much belongs to words that are said: in the window, and in that one
             utterance of it which holds the most; their mean. idf = ln(1 + (m - h + 1/2) / (h + 1/2)) for a word in h
             of m utterances, as BM25 has it
      cosine: of the query's eos with the nearest utterance of the window, both by the text tower
      z: standardised like the other views, by mean and deviation over pairs of the same queries with windows that speak

It is added to Eq. 11. What lies within two deviations is what anybody says by chance, and counts no more than silence:
the noise of a third view would cost the queries that speech does not answer (docs/search.md has the figures).

Here: all of that, candidates, the best utterance. Not here: how answers are ranked (engine.py), what is stored
(speech_store.py), who said it (speech_sources.py).

Legend: P texts, n windows in hand, m utterances of the index, g runs of utterances, D dimensions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import log
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from narvid.search.rows import Filter
from narvid.search.speech_store import Utterance

if TYPE_CHECKING:
    from narvid.search.embedding import Embedder
    from narvid.search.store import Store

CHANCE = 2.0  # deviations above the mean that count nothing
LEAST = 0.01  # a deviation: where neutral queries share no word with what is said, as in another language
COMMON = 20_000  # a word that is said in so many utterances tells nothing and is not looked for


class Asked(NamedTuple):
    """P texts as speech is asked for them."""

    eos: np.ndarray  # (P, D) of length 1
    words: np.ndarray  # (P,) of tuples: the different words of each


class Speech:
    """The speech of a store as a search sees it; of `embedder` only the text tower is used."""

    def __init__(self, store: Store, embedder: Embedder):
        self.store, self.said, self.embedder = store, store.speech, embedder
        self._change, self._count, self._holding = None, 0, {}

    def ask(self, texts: Sequence[str], eos: np.ndarray) -> Asked | None:
        """What is asked of speech for these texts, whose eos features are (P, D); None where nothing is said."""
        if self._change != (change := self.store.change):
            self._change, self._count, self._holding = change, self.said.count()[1], {}
        if not self._count:
            return None
        words = np.empty(len(texts), object)
        for p, text in enumerate(texts):
            words[p] = tuple(dict.fromkeys(re.findall(r"\w+", text.casefold())))
        return Asked(eos / np.maximum(np.linalg.norm(eos, axis=1, keepdims=True), 1e-12), words)

    def fit(self, asked: Asked, windows: Sequence[int]) -> np.ndarray:
        """Share and cosine (2, P, n) of texts and windows, NaN where nothing is said."""
        fit = np.full((2, len(asked.words), len(windows)), np.nan)
        places, said, vectors = self.said.of_windows(windows)
        if said:
            speaking, first = np.unique(places, return_index=True)  # said: window by window
            fit[:, :, speaking] = self._fit(asked, said, vectors, first)
        return fit

    def best(self, asked: Asked, windows: Sequence[int]) -> dict[int, Utterance]:
        """For each of these windows in which something is said the utterance that fits one text best."""
        places, said, vectors = self.said.of_windows(windows)
        found: dict[int, tuple[float, Utterance]] = {}
        if said:
            fit = self._fit(asked, said, vectors, np.arange(len(said)))[:, 0].sum(axis=0)
            for place, utterance, value in zip(places.tolist(), said, fit.tolist()):
                if windows[place] not in found or value > found[windows[place]][0]:
                    found[windows[place]] = value, utterance
        return {window: utterance for window, (_, utterance) in found.items()}

    def candidates(self, asked: Asked, where: Filter, count: int) -> np.ndarray:
        """Stage one: ids, rising, of the windows that hold the `count` utterances nearest to each text, and as many
        with the most of its words.
        """
        found = self.said.nearest(asked.eos, count, where)
        for words in asked.words:
            held = [(ids, self._idf(word)) for word in words if len(ids := self._holding_of(word))]
            if held:
                ids, place = np.unique(np.concatenate([ids for ids, _ in held]), return_inverse=True)
                mass = np.bincount(place, np.repeat([idf for _, idf in held], [len(ids) for ids, _ in held]))
                inside = self.said.within(ids, where)
                found.append(ids[inside][np.argsort(-mass[inside], kind="stable")[:count]])
        return self.said.windows_of(np.unique(np.concatenate(found)))

    # ---- inside ----

    def _fit(self, asked: Asked, said: Sequence[Utterance], vectors: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Share and cosine (2, P, g) of g runs of utterances, which begin at `first` (g,)."""
        ids, mass = np.array([utterance.id for utterance in said]), np.full(len(asked.words), 1e-12)
        in_each, in_run = np.zeros((len(mass), len(said))), np.zeros((len(mass), len(first)))
        texts_with: dict[str, list[int]] = {}
        for p, words in enumerate(asked.words):
            for word in words:
                texts_with.setdefault(word, []).append(p)
        for word, texts in texts_with.items():
            idf, holding = self._idf(word), self._holding_of(word)
            mass[texts] += idf
            if len(holding):
                holds = np.isin(ids, holding)
                in_each[texts] += idf * holds
                in_run[texts] += idf * np.logical_or.reduceat(holds, first)
        share = (in_run + np.maximum.reduceat(in_each, first, axis=1)) / 2 / mass[:, None]
        return np.stack([share, np.maximum.reduceat(asked.eos @ vectors.T, first, axis=1)])

    def _holding_of(self, word: str) -> np.ndarray:
        """Ids of the utterances that hold a word, rising; none for one that is too common."""
        if word not in self._holding:
            ids = self.said.with_word(word, COMMON)
            self._holding[word] = len(ids), ids if len(ids) < COMMON else ids[:0]
        return self._holding[word][1]

    def _idf(self, word: str) -> float:
        self._holding_of(word)
        count = self._holding[word][0]
        return 0.0 if count == COMMON else log(1 + (self._count - count + 0.5) / (count + 0.5))


def counted(fit: np.ndarray, statistics: Sequence[Sequence[float]]) -> np.ndarray:
    """z_qs (P, n) of share and cosine (2, P, n) and the mean and deviation of each; NaN where nothing is said."""
    return sum(np.maximum(0, (x - mean) / max(std, LEAST) - CHANCE) for x, (mean, std) in zip(fit, statistics))
