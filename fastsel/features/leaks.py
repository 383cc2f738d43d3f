"""Target rows that the pool already holds: chosen, they would flatter whatever is trained on the selection.

Equal: the question of a target row, or all of it, occurs in a pool row with the same words, whatever the case, the
punctuation and the white space. Near: a sentence encoder gives both questions vectors with a cosine of 0.95 or more.
"""

import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.errors import FastselWarning, MissingExtraError, UsageError
from fastsel.features.row_texts import RowText, whole_text
from fastsel.features.targets import Target
from fastsel.io.examples import STATUS, Example

if TYPE_CHECKING:
    from fastsel.io import Pool

HOW = ("near", "equal", "none")
NEAR = 0.95  # cosine
LISTED = 100  # pairs of rows, in a manifest
LEAST_CHARACTERS = 20  # of a question that counts: "Continue" and "Translate this" are asked everywhere
_WORDS = re.compile(r"\w+")


class Leak(NamedTuple):
    """One pool row that holds a target row.

    Attributes:
        row: of the pool.
        target: the target's name.
        target_row: of its file.
        cosine: of the two questions; 1 where they are equal.
        is_equal: whether the words are.
    """

    row: int
    target: str
    target_row: int
    cosine: float
    is_equal: bool


@dataclass(frozen=True)
class Leaks:
    """What was found.

    Attributes:
        found: for each pool row with a target row in it the one that is nearest, by pool row.
        n_targets: target rows that were looked for.
        looked_for: "near" or "equal".
    """

    found: list[Leak]
    n_targets: int
    looked_for: str

    def mask(self, n: int) -> NDArray[np.bool_]:
        """Bool [n]: the pool rows."""
        rows = np.zeros(n, np.bool_)
        rows[[leak.row for leak in self.found]] = True
        return rows

    @property
    def note(self) -> str:
        """One line for the user."""
        if not self.found:
            looked = (
                "not looked for" if self.looked_for == "none" else f"no target row is in the pool ({self.looked_for})"
            )
            return f"leaks: {looked}"
        equal = sum(leak.is_equal for leak in self.found)
        targets = len({(leak.target, leak.target_row) for leak in self.found})
        first = self.found[0]
        return (
            f"leaks: {len(self.found):,} pool rows hold {targets:,} of {self.n_targets:,} target rows "
            f"({equal:,} equal, {len(self.found) - equal:,} near); "
            f"pool row {first.row} holds row {first.target_row} of {first.target}"
        )

    def record(self, dropped: bool) -> dict[str, Any]:
        """What the manifest keeps: counts, and the first pairs of rows."""
        return {
            "looked_for": self.looked_for,
            "pool_rows": len(self.found),
            "equal": sum(leak.is_equal for leak in self.found),
            "dropped": dropped and bool(self.found),
            "first": [leak._asdict() for leak in self.found[:LISTED]],
        }

    def warn(self, dropped: bool) -> None:
        """Warn of leaks that were found, and say what became of them."""
        if self.found:
            become = "they are left out" if dropped else "--drop-leaks leaves them out"
            warnings.warn(f"{self.note}; {become}", FastselWarning, stacklevel=3)


REASON = "it holds a row of the target"


def find_leaks(
    pool: "Pool",
    targets: Sequence[Target],
    *,
    how: str = "near",
    encoder: Any = "bundled",
    similarity: float = NEAR,
    device: str = "auto",
    store: Any = None,
    progress: str = "none",
) -> Leaks:
    """Look for target rows in the pool.

    Args:
        pool, targets: the rows.
        how: "near" (equal ones too), "equal" (no model runs), or "none".
        encoder: see load_encoder; where it is not installed, only equal rows are looked for, with a warning.
        similarity: the least cosine of near rows.
        device: of the encoder.
        store: a folder of its own for the pool's vectors, or None.
        progress: see progress_bar.

    Raises:
        UsageError: an option has no such value.
        InputError: see embed_pool.
    """
    if how not in HOW:
        raise UsageError(f"leaks={how!r} is not known; it is one of: {', '.join(HOW)}")
    n_targets = sum(map(len, targets))
    if how == "none":
        return Leaks([], n_targets, how)
    found = _equal(pool, targets)
    if how == "near":
        try:
            near = _near(pool, targets, encoder, similarity, device=device, store=store, progress=progress)
        except MissingExtraError as missing:
            warnings.warn(f"leaks: only equal rows are looked for: {missing}", FastselWarning, stacklevel=2)
            how, near = "equal", {}
        found = near | found
    return Leaks([found[row] for row in sorted(found)], n_targets, how)


def _equal(pool: "Pool", targets: Sequence[Target]) -> dict[int, Leak]:
    whose: dict[str, tuple[str, int]] = {}
    for target in targets:
        for example in target.examples():
            for words in _words_of(example):
                whose.setdefault(words, (target.name, example.row_id))
    found = {}
    for examples in pool.chunks():
        for example in examples:
            if example.status == STATUS[0]:
                held = next((whose[words] for words in _words_of(example) if words in whose), None)
                if held is not None:
                    found[example.row_id] = Leak(example.row_id, *held, 1.0, True)
    return found


def _words_of(example: Example) -> Iterator[str]:
    """What is compared: the whole row, all that is asked in it, and each question in it."""
    asked = [message.content for message in example.messages if message.role == "user"]
    yield plain_words(whole_text(example))
    for text in dict.fromkeys(["\n".join(asked), *asked]):
        words = plain_words(text)
        if len(words) >= LEAST_CHARACTERS:
            yield words


def plain_words(text: str) -> str:
    """The words of a text in lower case, one space between them; no other characters."""
    return " ".join(_WORDS.findall(unicodedata.normalize("NFKC", text).casefold()))


class _Question(RowText):
    """What is asked in a row; all of a row in which nothing is asked."""

    def __init__(self) -> None:
        super().__init__("instruction")
        self._asked = RowText("instruction")
        self.name = "question"

    def __call__(self, example: Example) -> str:
        return self._asked(example) or whole_text(example)


def _near(
    pool: "Pool", targets: Sequence[Target], encoder: Any, similarity: float, *, store: Any, **options: Any
) -> dict[int, Leak]:
    from fastsel.features.embeddings import embed_pool
    from fastsel.kernels.topk_similarity import topk_similarity
    from fastsel.models.encoders import load_encoder

    loaded = load_encoder(encoder, device=options["device"])
    options["text"] = _Question()
    of_pool = embed_pool(pool, loaded, store=None if store is None else Path(store), **options)
    points: list[NDArray[np.float32]] = []
    places: list[tuple[str, int]] = []
    for target in targets:
        of_target = embed_pool(target.pool, loaded, **options | {"progress": "none"})
        counts = np.isin(of_target.rows, target.rows)
        points.append(of_target.matrix[counts])
        places += [(target.name, int(row)) for row in of_target.rows[counts]]
    best = topk_similarity(_unit(of_pool.matrix), _unit(np.concatenate(points)), 1)
    cosines, nearest = best.values[:, 0].cpu().numpy(), best.indices[:, 0].cpu().numpy()
    found = {}
    for i in np.flatnonzero(cosines >= similarity):
        (target_name, target_row), row = places[nearest[i]], int(of_pool.rows[i])
        found[row] = Leak(row, target_name, target_row, float(cosines[i]), False)
    return found


def _unit(vectors: NDArray[np.float32]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(vectors)), dim=1)
