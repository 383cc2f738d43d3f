"""One vector a row: what selectors compare. From an encoder over the pool, or from a matrix of the user's.

Batches are cut inside shards of the pool, from token counts alone, sorted by length; so a run that was interrupted ends
in the same bytes. Rows with equal texts have equal vectors, to the bit: whether two rows tie is then no matter of the
batch that they were in.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

import fastsel
from fastsel.errors import InputError, UsageError
from fastsel.features.batches import ROWS_AT_ONCE, Shard
from fastsel.features.row_texts import RowText, whole_text
from fastsel.features.shard_runs import Executor, run_shards
from fastsel.io.examples import OK, SKIPPED, STATUS, TRUNCATED, Example
from fastsel.io.row_reasons import RowReasons
from fastsel.kernels._runtime.dispatch import recording
from fastsel.models.encoders import Encoder, load_encoder
from fastsel.progress import progress_bar

if TYPE_CHECKING:
    from fastsel.io import Pool

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
BLOCK_ROWS = 8192
REASONS = (
    None,
    "the row has no {text} to embed",
    "the {text} is embedded from its first {max_length} tokens",
    "its vector is not finite",
)
FITS, NO_TEXT, CUT, NOT_FINITE = range(len(REASONS))


@dataclass
class Embeddings:
    """Vectors of the rows that have one.

    Attributes:
        matrix: float32 [m, d]; mapped from the file when it is the user's.
        rows: int64 [m], the pool row of each vector, ascending.
        status: uint8 [n], the pool's codes with truncated and skipped rows added.
        reasons: why a row is not ok, with its line.
        n_tokens: int32 [n], tokens of the whole row (all its messages) under the encoder's tokenizer, not cut; 0 for
            unusable rows. None for a matrix of the user's.
        timings: seconds by step.
        notes: lines for the user.
        provenance: encoder, text, pooling, device and what ran each kernel, for the manifest.
    """

    matrix: NDArray[np.float32]
    rows: NDArray[np.int64]
    status: NDArray[np.uint8]
    reasons: RowReasons
    n_tokens: NDArray[np.int32] | None
    timings: dict[str, float]
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Put down the seconds of what is done inside."""
        started = time.perf_counter()
        yield
        self.timings[step] = time.perf_counter() - started

    def drop(self, rows: NDArray[np.bool_], reason: str) -> None:
        """Leave the rows of this mask [n] without a vector.

        Raises:
            InputError: none is left.
        """
        dropped = rows & self.has_vector
        if dropped.any():
            self.matrix, self.rows = self.matrix[~rows[self.rows]], self.rows[~rows[self.rows]]
            self.status[dropped] = SKIPPED
            self.reasons.add(dropped, reason)
        if not len(self.rows):
            raise InputError(f"no row is left to choose from: {reason}")

    @property
    def has_vector(self) -> NDArray[np.bool_]:
        """Bool [n]: rows with a vector."""
        mask = np.zeros(len(self.status), np.bool_)
        mask[self.rows] = True
        return mask


def embed_pool(
    pool: "Pool",
    encoder: Any = "bundled",
    *,
    text: str | RowText = "instruction",
    pooling: str = "auto",
    max_length: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_tokens: int | None = None,
    implementation: str = "auto",
    store: Any = None,
    executor: Executor | None = None,
    progress: str = "auto",
) -> Embeddings:
    """Embed every usable row of a pool.

    Args:
        pool: the rows.
        encoder: see load_encoder; or a .npy file or an array [n, d] of the user's, one row for each pool row.
        text: "instruction", "answer", "conversation" or "template:NAME"; see RowText.
        pooling, max_length, device, dtype, implementation: see load_encoder. A longer text is cut, and its row is
            "truncated".
        batch_tokens: tokens a forward processes at once; None takes 2,048 on a CPU and 16,384 on a GPU.
        store: a folder that keeps finished shards, so that the same call goes on after an interruption; or None.
        executor: where shards run; None runs them here, one after another.
        progress: see progress_bar; counts tokens.

    Raises:
        InputError: the encoder cannot be used; the store holds something else; a matrix of another length, or with NaN.
        UsageError: an option has no such value; no row is left.
    """
    row_text = text if isinstance(text, RowText) else RowText(text)
    if batch_tokens is not None and batch_tokens < 1:
        raise UsageError(f"batch_tokens={batch_tokens} must be at least 1")
    if _is_matrix(encoder):
        return _users_own(pool, encoder)
    started = time.perf_counter()
    loaded = load_encoder(
        encoder, pooling=pooling, max_length=max_length, device=device, dtype=dtype, implementation=implementation
    )
    per_batch = batch_tokens or BATCH_TOKENS["cpu" if loaded.device == "cpu" else "cuda"]
    options = {
        "model": {"name": loaded.name, "revision": loaded.revision, "fingerprint": loaded.fingerprint},
        "device": loaded.device,
        "dtype": loaded.dtype,
        "implementation": implementation,
        "implementations": _what_runs(loaded),
        "text": row_text.name,
        "pooling": loaded.pooling,
        "max_length": loaded.max_length,
        "batch_tokens": per_batch,
    }
    feature = {"feature": "embeddings", "fastsel": fastsel.__version__}
    tokenise = partial(_row_tokens, loaded, row_text)
    prepared_s = time.perf_counter() - started
    # Rows without a vector hold zeros here and are left out at the end.
    vectors = np.zeros((len(pool), loaded.d), np.float32)
    records = np.zeros(len(pool), _record(0))
    run = run_shards(
        pool, tokenise, lambda on_tokens: partial(_embed_shard, pool, tokenise, loaded, per_batch, on_tokens),
        lambda shard, of_shard: _put(of_shard, shard, records, vectors),
        fingerprint={**feature, **options}, store=store, executor=executor, progress=progress, description="embedding",
    )  # fmt: skip
    embeddings = _collect(pool, records, vectors, row_text.name, loaded.max_length)
    embeddings.timings = {"prepare": prepared_s, "plan": run.plan_s, "embed": run.work_s}
    embeddings.provenance = {**options, "forward": loaded.path}
    embeddings.notes = [*loaded.notes]
    return embeddings


def _what_runs(encoder: Encoder) -> dict[str, str]:
    """Kernel -> the code that runs it for this encoder here, and torch: they decide the last bits."""
    if encoder.path == "table":
        return {}
    from fastsel.features.answer_scorer import torch_build

    sequence, _ = encoder.sequence(encoder.tokenise(["a"])[0])
    with recording() as ran:
        if sequence:
            encoder.embed([sequence])
    return {**ran, "torch": torch_build()}


def embed_texts(
    texts: Sequence[str],
    encoder: Any = "bundled",
    *,
    pooling: str = "auto",
    max_length: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_tokens: int | None = None,
    implementation: str = "auto",
    progress: str = "none",
) -> NDArray[np.float32]:
    """Float32 [m, d]: a vector for each text, in order; equal texts have equal bits.

    Args:
        texts: none of them blank.
        encoder, pooling, max_length, device, dtype, batch_tokens, implementation, progress: see embed_pool.

    Raises:
        InputError: the encoder cannot be used; a text is empty for it.
        UsageError: an option has no such value.
    """
    loaded = load_encoder(
        encoder, pooling=pooling, max_length=max_length, device=device, dtype=dtype, implementation=implementation
    )
    per_batch = batch_tokens or BATCH_TOKENS["cpu" if loaded.device == "cpu" else "cuda"]
    distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    sequences = [loaded.sequence(tokens)[0] for tokens in loaded.tokenise(list(distinct))]
    for text, sequence in zip(distinct, sequences, strict=True):
        if not sequence:
            raise InputError(f"a text has no tokens for {loaded.name}: {text[:40]!r}")
    vectors = np.zeros((len(sequences), loaded.d), np.float32)
    with progress_bar(sum(map(len, sequences)), "tok", mode=progress, description="embedding texts") as bar:
        for batch in _batches(sequences, per_batch):
            vectors[batch] = loaded.embed([sequences[i] for i in batch])
            bar.update(sum(len(sequences[i]) for i in batch))
    return vectors[[distinct[text] for text in texts]]


class _RowTokens(NamedTuple):
    """A pool row ready for the encoder: what is embedded (none when there is nothing), and what was cut or counted."""

    row_id: int
    sequence: list[int]
    is_cut: bool
    n_tokens: int

    @property
    def size(self) -> int:
        return len(self.sequence)


def _row_tokens(encoder: Encoder, row_text: RowText, examples: Sequence[Example]) -> list[_RowTokens]:
    """One for each usable example, in order."""
    usable = [example for example in examples if example.status == STATUS[OK]]
    texts = [row_text(example) for example in usable]
    wholes = [whole_text(example) for example in usable]
    distinct = dict.fromkeys([*texts, *wholes])
    tokens_of = dict(zip(distinct, encoder.tokenise(list(distinct)), strict=True))
    rows = []
    for example, text, whole in zip(usable, texts, wholes, strict=True):
        tokens = tokens_of[text] if text.strip() else []
        sequence, is_cut = encoder.sequence(tokens, ended=row_text.is_ended)
        rows.append(_RowTokens(example.row_id, sequence, is_cut, len(tokens_of[whole])))
    return rows


def _batches(sequences: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of sequences, short ones first, at most batch_tokens tokens (or one sequence) at a time."""
    batch: list[int] = []
    filled = 0
    for i in sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i)):
        if batch and filled + len(sequences[i]) > batch_tokens:
            yield batch
            batch, filled = [], 0
        batch.append(i)
        filled += len(sequences[i])
    if batch:
        yield batch


def _record(d: int) -> np.dtype[Any]:
    """What is kept of a row; `text` names what was embedded, 128 bits."""
    fields: list[Any] = [("n_tokens", "<i4"), ("why", "|u1"), ("text", "<u8", (2,))]
    return np.dtype([*fields, ("vector", "<f4", (d,))] if d else fields)


def _embed_shard(
    pool: "Pool",
    tokenise: Callable[[Sequence[Example]], list[_RowTokens]],
    encoder: Encoder,
    batch_tokens: int,
    on_tokens: Callable[[int], None] | None,
    shard: Shard,
) -> NDArray[Any]:
    """The records of one shard."""
    records = np.zeros(shard.stop - shard.start, _record(encoder.d))
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for examples in pool.chunks(shard.start, shard.stop, rows=ROWS_AT_ONCE):
        for row in tokenise(examples):
            place = row.row_id - shard.start
            records["n_tokens"][place] = row.n_tokens
            records["why"][place] = CUT if row.is_cut else FITS if row.sequence else NO_TEXT
            if row.sequence:
                rows_of.setdefault(tuple(row.sequence), []).append(place)
    sequences = list(rows_of)
    for batch in _batches(sequences, batch_tokens):
        vectors = encoder.embed([sequences[i] for i in batch])
        for i, vector in zip(batch, vectors, strict=True):
            rows = rows_of[sequences[i]]
            name = xxhash.xxh3_128_digest(np.array(sequences[i], "<i8").tobytes())
            records["text"][rows] = np.frombuffer(name, "<u8")
            if np.isfinite(vector).all():
                records["vector"][rows] = vector
            else:
                records["why"][rows] = NOT_FINITE
            if on_tokens is not None:
                on_tokens(len(sequences[i]) * len(rows))
    return records


def _put(result: NDArray[Any], shard: Shard, records: NDArray[Any], vectors: NDArray[np.float32]) -> None:
    vectors[shard.start : shard.stop] = result["vector"]
    for name in _record(0).names or ():
        records[name][shard.start : shard.stop] = result[name]


def _collect(
    pool: "Pool", records: NDArray[Any], vectors: NDArray[np.float32], text: str, max_length: int
) -> Embeddings:
    usable = pool.status == OK
    has_vector = usable & np.isin(records["why"], (FITS, CUT))
    rows = np.flatnonzero(has_vector)
    if not len(rows):
        raise InputError(f"{pool.name}: no row has a {text} to embed; text names another part of the rows")
    # Equal texts in different shards were in different batches, whose last bits may differ.
    _, first, which = np.unique(records["text"][rows], axis=0, return_index=True, return_inverse=True)
    source = rows[first[which.reshape(-1)]]
    moved = source != rows
    vectors[rows[moved]] = vectors[source[moved]]
    if len(rows) < len(pool):
        for start in range(0, len(rows), BLOCK_ROWS):  # upwards, in place: a vector never moves down
            block = rows[start : start + BLOCK_ROWS]
            vectors[start : start + len(block)] = vectors[block]
    status = np.array(pool.status, dtype=np.uint8)
    status[usable & ~has_vector] = SKIPPED
    status[has_vector & (records["why"] == CUT)] = TRUNCATED
    words = [reason and reason.format(text=text, max_length=max_length) for reason in REASONS]
    reasons = RowReasons(pool, np.where(usable, records["why"], FITS), words)
    n_tokens = records["n_tokens"].astype(np.int32)
    return Embeddings(vectors[: len(rows)], rows, status, reasons, n_tokens, {})


def _is_matrix(encoder: Any) -> bool:
    if isinstance(encoder, (str, Path)):
        return str(encoder).endswith(".npy")
    return hasattr(encoder, "shape") and hasattr(encoder, "dtype") and not hasattr(encoder, "embed")


def _users_own(pool: "Pool", matrix: Any) -> Embeddings:
    """A matrix with one row for each pool row."""
    started = time.perf_counter()
    if isinstance(matrix, (str, Path)):
        name = str(matrix)
        try:
            array = np.load(matrix, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"embeddings {name} cannot be read: {error}") from error
    else:
        name = "the array"
        array = matrix.detach().float().cpu().numpy() if hasattr(matrix, "detach") else np.asarray(matrix)
    if array.ndim != 2 or array.dtype.kind not in "fiu" or array.shape[1] < 1:
        raise InputError(f"embeddings {name}: wants numbers [rows, features], got {array.dtype} {list(array.shape)}")
    if len(array) != len(pool):
        raise InputError(
            f"embeddings {name}: it has {len(array):,} rows and the pool {len(pool):,}; row i of the matrix must be "
            "that of row i of the pool, unusable rows and all"
        )
    rows = np.flatnonzero(pool.status == OK)
    digest = xxhash.xxh3_128()
    for start in range(0, len(rows), BLOCK_ROWS):
        block = np.ascontiguousarray(array[rows[start : start + BLOCK_ROWS]], dtype=np.float32)
        bad = ~np.isfinite(block).all(axis=1)
        if bad.any():
            row = int(rows[start + int(bad.argmax())])
            raise InputError(f"embeddings {name}: row {row} holds NaN or infinity (or more than float32 can)")
        digest.update(block.tobytes())
    is_whole = len(rows) == len(array) and array.dtype == np.float32
    vectors = array if is_whole else np.ascontiguousarray(array[rows], dtype=np.float32)
    return Embeddings(
        matrix=vectors,
        rows=rows,
        status=np.array(pool.status, dtype=np.uint8),
        reasons=RowReasons(pool, np.zeros(len(pool), np.uint8), REASONS[:1]),
        n_tokens=None,
        timings={"embed": time.perf_counter() - started},
        provenance={"model": {"name": name, "revision": None, "fingerprint": digest.hexdigest()}},
    )
