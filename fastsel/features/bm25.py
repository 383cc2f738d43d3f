"""BM25: how well the words of a query are answered by each row of a pool.

Our own, since the index is what must be kept small and summed in float64 over whole subtasks: bm25s and rank_bm25 keep
texts or score one query at a time, and bring their own tokenizers.
"""

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

# A word, or one character of a script that puts no spaces between words (Han, kana, Thai, Lao, Khmer, Burmese).
_TOKEN = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_]+"
)
_APART = re.compile(r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")


def words(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters and digits; scripts without spaces by the character."""
    return [token for part in _APART.split(text.lower()) for token in _TOKEN.findall(part)]


class BM25:
    """An index over n texts.

        score(q, i) = sum_w q_w idf_w f_wi (k1 + 1) / (f_wi + k1 (1 - b + b |i| / mean |.|))
        idf_w       = ln(1 + (n - n_w + 1/2) / (n_w + 1/2))

    f_wi: how often word w stands in text i; |i|: its words; n_w: texts with w; q_w: how often w is asked for. The idf
    is Lucene's, which is never negative. Source: Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework".

    Attributes:
        n: texts.
        vocabulary: word -> its number.
    """

    def __init__(self, texts: Iterable[str], *, k1: float = 1.5, b: float = 0.75) -> None:
        """Read the texts once; 12 bytes are kept for each distinct word of each text.

        Args:
            texts: n texts; one without words scores 0 for every query.
            k1: how fast more of the same word stops to count.
            b: how much long texts are held back, 0 to 1.
        """
        self.vocabulary: dict[str, int] = {}
        ids, rows, counts, lengths = array("i"), array("i"), array("i"), array("i")
        for row, text in enumerate(texts):
            found = words(text)
            lengths.append(len(found))
            for word, count in Counter(found).items():
                ids.append(self.vocabulary.setdefault(word, len(self.vocabulary)))
                rows.append(row)
                counts.append(count)
        self.n = len(lengths)
        word_of, frequency = np.array(ids, np.int64), np.array(counts, np.float64)
        order = np.argsort(word_of, kind="stable")
        self._rows = np.array(rows, np.int32)[order]
        texts_with = np.bincount(word_of, minlength=len(self.vocabulary))
        self._starts = np.concatenate([[0], np.cumsum(texts_with)])
        length = np.array(lengths, np.float64)
        damping = k1 * (1 - b + b * length / max(float(length.mean()) if self.n else 0.0, 1e-300))
        idf = np.log1p((self.n - texts_with + 0.5) / (texts_with + 0.5))
        weights = idf[word_of] * frequency * (k1 + 1) / (frequency + damping[np.array(rows, np.int64)])
        self._weights = weights[order]

    def scores(self, query: Mapping[str, float]) -> NDArray[np.float64]:
        """Float64 [n]: the score of every text for a query, given as word -> q_w; words that no text has count nothing.

        Linear in the query: the mean over queries is the score of their mean.
        """
        total = np.zeros(self.n)
        for word, weight in query.items():
            at = self.vocabulary.get(word)
            if at is not None:
                place = slice(self._starts[at], self._starts[at + 1])
                total[self._rows[place]] += weight * self._weights[place]
        return total


def mean_query(texts: Iterable[str]) -> dict[str, float]:
    """The mean of the word counts of some texts."""
    counts: Counter[str] = Counter()
    n = 0
    for text in texts:
        counts.update(words(text))
        n += 1
    return {word: count / n for word, count in counts.items()}


def single_queries(texts: Iterable[str]) -> Iterator[dict[str, float]]:
    """The word counts of each text."""
    return ({word: float(count) for word, count in Counter(words(text)).items()} for text in texts)
