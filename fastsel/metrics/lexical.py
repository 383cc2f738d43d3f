"""Variety of words: the type-token ratio, and vocd-D, which does not fall with the length of a text."""

import math
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from fastsel.errors import UsageError

SAMPLE_SIZES = range(35, 51)  # tokens; what vocd-D is defined with
SAMPLES, REPEATS = 100, 3
SHORT = ("skip", "zero")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))
Tokenizer = Callable[[str], Sequence[str]]


def words(text: str) -> list[str]:
    """Lower-case words as LexicalRichness splits them: digits and dashes vanish, punctuation separates."""
    plain = re.sub(r"[0-9]+", "", text.lower()).replace("–", "").replace("—", "").replace("-", "")
    return plain.translate(_PUNCTUATION).split()


def ttr(texts: Iterable[str], *, tokenizer: Tokenizer = words, pooled: bool = False) -> float:
    """Type-token ratio: distinct words over words, of each text, and the mean over texts.

    Args:
        texts: the rows' texts. One without a word counts for nothing.
        tokenizer: text -> words; the default's ratio of one text equals LexicalRichness(text).ttr.
        pooled: the ratio of all texts as one instead of the mean.

    Returns:
        Between 0 and 1; NaN when no text has a word. It falls with the length of a text.

    Source: Johnson 1944; as a metric of instruction data in NovelSum (arXiv 2502.17184).
    """
    counts = [Counter(found) for found in map(tokenizer, _checked(texts)) if found]
    if not counts:
        return float("nan")
    if pooled:
        total: Counter[str] = Counter()
        for count in counts:
            total.update(count)
        counts = [total]
    return math.fsum(len(count) / count.total() for count in counts) / len(counts)


def vocd_d(
    texts: Iterable[str],
    *,
    exact: bool = True,
    seed: int = 42,
    short: str = "skip",
    tokenizer: Tokenizer = words,
    pooled: bool = False,
) -> float:
    """vocd-D: the D whose curve (D / N) (sqrt(1 + 2 N / D) - 1) fits the type-token ratios of samples of 35..50 words.

    Args:
        texts: the rows' texts.
        exact: True takes the expected ratio of a random sample, which is hypergeometric: no sampling, no seed. False
            samples as LexicalRichness(text).vocd(seed=seed) does: 100 samples of each size, three times, the mean D.
        seed: of those samples, drawn anew for every text.
        short: texts of at most 50 words have no D. "skip" leaves them out; "zero" counts them as 0, as ODA does.
        tokenizer: text -> words.
        pooled: D of all texts as one instead of the mean.

    Returns:
        The mean D; NaN when no text has one. 10 to 100 for most texts; larger for a richer vocabulary. Texts in which
        no word repeats have no finite D: what the fit's bound gives, 1e6, is then a statement of that.

    Source: McKee, Malvern & Richards, "Measuring Vocabulary Diversity Using Dedicated Software", 2000; the expectation
        as in McCarthy & Jarvis, "MTLD, vocd-D, and HD-D", 2010.
    """
    if short not in SHORT:
        raise UsageError(f"short must be one of {', '.join(SHORT)}; got {short!r}")
    tokens = [list(tokenizer(text)) for text in _checked(texts)]
    if pooled:
        tokens = [[word for found in tokens for word in found]]
    values = []
    for found in tokens:
        if len(found) <= SAMPLE_SIZES[-1]:
            if short == "zero":
                values.append(0.0)
        elif exact:
            values.append(_fitted(_expected_ratios(found)))
        else:
            generator = random.Random(seed)
            values.append(math.fsum(_fitted(_sampled_ratios(found, generator)) for _ in range(REPEATS)) / REPEATS)
    return math.fsum(values) / len(values) if values else float("nan")


def _checked(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise UsageError("texts must be a list of texts; this is one text")
    found = list(texts)
    for row, text in enumerate(found):
        if not isinstance(text, str):
            raise UsageError(f"texts: row {row} is {type(text).__name__}, not a text")
    return found


def _expected_ratios(tokens: list[str]) -> NDArray[np.float64]:
    """Expected types / N in N tokens drawn without replacement, float64 [16].

    A word that stands there f times among n is missed with probability C(n - f, N) / C(n, N), which is the product
    over i < f of (n - N - i) / (n - i).
    """
    n = len(tokens)
    sizes = np.arange(SAMPLE_SIZES[0], SAMPLE_SIZES[-1] + 1, dtype=np.float64)
    how_many = Counter(Counter(tokens).values())
    missed, types = np.ones(len(sizes)), np.zeros(len(sizes))
    for i in range(max(how_many)):
        missed = missed * np.maximum(n - sizes - i, 0.0) / (n - i)
        types += how_many.get(i + 1, 0) * (1.0 - missed)
    return types / sizes


def _sampled_ratios(tokens: list[str], generator: random.Random) -> NDArray[np.float64]:
    return np.array([
        np.mean([len(set(generator.sample(tokens, k=size))) / size for _ in range(SAMPLES)]) for size in SAMPLE_SIZES
    ])  # fmt: skip


def _fitted(ratios: NDArray[np.float64]) -> float:
    """The D of least squared error: where its slope over log D is 0, by bisection."""
    sizes = np.arange(SAMPLE_SIZES[0], SAMPLE_SIZES[-1] + 1, dtype=np.float64)

    def slope(log_d: float) -> float:
        d = math.exp(log_d)
        root = np.sqrt(1.0 + 2.0 * sizes / d)
        # 2 / (root + 1) is (d / N)(root - 1) without the cancellation of a large d.
        error = 2.0 / (root + 1.0) - ratios
        return float((error * 2.0 * sizes / (d * root * (root + 1.0) ** 2)).sum())

    # The curve grows with d at every N: for a small d it lies below all ratios, for a large one above.
    low, high = math.log(1e-3), math.log(1e6)
    if slope(high) <= 0:
        return math.exp(high)
    for _ in range(80):
        middle = (low + high) / 2
        if slope(middle) > 0:
            high = middle
        else:
            low = middle
    return math.exp((low + high) / 2)
