"""What a pool keeps of each row: numbers and hashes in growing arrays, never the row."""

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping

import pyarrow as pa

from fastsel.io.examples import well_formed

_ROWS_A_BLOCK = 4096


class Reasons(Mapping[int, str]):
    """Row number -> why the row is not ok. Kept as numbers and few distinct texts: any share of a pool may be bad."""

    def __init__(self) -> None:
        self._rows = array("q")
        self._places = array("q")
        self._texts = array("q")
        self._known: dict[tuple[str, str], int] = {}
        self._all: list[tuple[str, str]] = []

    def add(self, row: int, place: str, text: str) -> None:
        """Rows must come in ascending order. place is words and a number, such as "line 12"."""
        words, _, number = place.rpartition(" ")
        key = words, well_formed(text)
        if key not in self._known:
            self._known[key] = len(self._all)
            self._all.append(key)
        self._rows.append(row)
        self._places.append(int(number))
        self._texts.append(self._known[key])

    def __getitem__(self, row: int) -> str:
        position = bisect_left(self._rows, row)
        if position == len(self._rows) or self._rows[position] != row:
            raise KeyError(row)
        words, text = self._all[self._texts[position]]
        return f"{words} {self._places[position]}: {text}"

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class RowIndex:
    """What the first pass over a pool collects, in arrays that grow: about 60 bytes a row with ids and sources."""

    def __init__(self, score_column: str | None) -> None:
        self.status = bytearray()
        self.hashes = bytearray()
        self.reasons = Reasons()
        self.scores = array("d") if score_column is not None else None
        self.layouts: Counter[str] = Counter()
        self._ids: list[str | None] = []
        self._sources: list[str | None] = []
        self._id_chunks: list[pa.Array] = []
        self._source_chunks: list[pa.Array] = []

    def add(self, code: int, hash: bytes, own_id: str | None, source: str | None, score: float) -> None:
        self.status.append(code)
        self.hashes += hash
        self._ids.append(own_id)
        self._sources.append(source)
        if self.scores is not None:
            self.scores.append(score)
        if len(self._ids) == _ROWS_A_BLOCK:
            self._flush()

    def _flush(self) -> None:
        self._id_chunks.append(pa.array(self._ids, pa.string()))
        self._source_chunks.append(pa.array(self._sources, pa.string()).dictionary_encode())
        self._ids.clear()
        self._sources.clear()

    def columns(self) -> tuple[pa.ChunkedArray | None, pa.ChunkedArray | None]:
        """Ids and sources; None for a column without a value."""
        self._flush()
        ids = pa.chunked_array(self._id_chunks, pa.string())
        sources = pa.chunked_array(self._source_chunks, pa.dictionary(pa.int32(), pa.string()))
        return (
            ids if ids.null_count < len(ids) else None,
            sources if sources.null_count < len(sources) else None,
        )
