"""Columns: Parquet, Arrow, saved folders, tables, frames and data sets all give the rows of the same JSON Lines."""

import decimal
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastsel.errors import InputError, RunFailedError
from fastsel.io import open_pool

TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
ROWS = [
    {
        "id": f"row-{i}",
        "source": f"set-{i % 3}",
        "instruction": f"Say {i}." if i % 10 else None,
        "output": f"é{i}" if i % 7 else " ",
        "messages": None if i % 10 else TURNS,
        "n": i,
    }
    for i in range(100)
]
SCHEMA = pa.schema(
    [
        pa.field("id", pa.large_string(), nullable=False),
        ("source", pa.dictionary(pa.int8(), pa.string())),
        ("instruction", pa.string()),
        ("output", pa.string()),
        ("messages", pa.list_(pa.field("turn", pa.struct([("role", pa.string()), ("content", pa.string())])))),
        pa.field("n", pa.int16(), metadata={"unit": "rows"}),
    ],
    metadata={"made by": "a test"},
)
TABLE = pa.Table.from_pylist(ROWS, schema=SCHEMA)
SHUFFLED = [41, 7, 99, 0, 70, 8, 41]


def parquet(folder):
    pq.write_table(TABLE, folder / "pool.parquet", row_group_size=17, use_compliant_nested_type=False)
    return folder / "pool.parquet"


def arrow_file(folder):
    with pa.ipc.new_file(folder / "pool.arrow", SCHEMA) as out:
        out.write_table(TABLE, max_chunksize=13)
    return folder / "pool.arrow"


def arrow_stream(folder):
    with pa.ipc.new_stream(folder / "pool.arrow", SCHEMA) as out:
        out.write_table(TABLE, max_chunksize=13)
    return folder / "pool.arrow"


def shards(folder):
    for index, start in enumerate(range(0, 100, 30)):
        pq.write_table(TABLE.slice(start, 30), folder / f"pool-{index}.parquet", use_compliant_nested_type=False)
    return str(folder / "pool-*.parquet")


class Exported:
    """Anything that hands over Arrow data by its C interface."""

    def __arrow_c_stream__(self, requested_schema=None):
        return TABLE.__arrow_c_stream__(requested_schema)


SOURCES = {
    "parquet": parquet,
    "arrow file": arrow_file,
    "arrow stream": arrow_stream,
    "shards": shards,
    "pyarrow table": lambda folder: pa.concat_tables([TABLE.slice(0, 45), TABLE.slice(45)]),
    "C stream": lambda folder: Exported(),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_columns_give_the_same_pool_as_a_list(tmp_path, make):
    expected, pool = open_pool(ROWS), open_pool(make(tmp_path))
    assert len(pool) == 100 and pool.status.tolist() == expected.status.tolist()
    assert sorted(set(pool.status.tolist())) == [0, 2]
    assert dict(pool.reasons) == dict(expected.reasons) and "row_id 7: the answer (output) is only" in pool.reasons[7]
    assert (pool.content_hash == expected.content_hash).all()
    assert pool.ids().to_pylist() == [row["id"] for row in ROWS]
    assert pool.sources().to_pylist() == [row["source"] for row in ROWS]
    assert pool.fingerprint == expected.fingerprint and len(pool.inputs[0].sha256) == 64
    everything = expected.examples(range(100))
    assert [example for chunk in pool.chunks(rows=9) for example in chunk] == everything
    assert [example for chunk in pool.chunks(16, 83) for example in chunk] == everything[16:83]
    assert pool.examples(SHUFFLED) == [everything[row] for row in SHUFFLED]
    assert pool.rows(SHUFFLED) == [ROWS[row] for row in SHUFFLED]


@pytest.mark.parametrize("rows", [SHUFFLED, [], list(range(100))], ids=["some", "none", "all"])
@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_rows_are_written_with_equal_values_and_schema(tmp_path, make, rows):
    pool = open_pool(make(tmp_path))
    out = pool.write_rows(rows, tmp_path / "selected")
    assert out == tmp_path / "selected.parquet"
    written = pq.read_table(out)
    assert written.schema.equals(SCHEMA, check_metadata=True)
    assert written.to_pylist() == [ROWS[row] for row in rows]
    again = pool.write_rows(np.asarray(rows, dtype=np.int64), tmp_path / "again.jsonl")
    assert again.name == "again.parquet" and again.read_bytes() == out.read_bytes()


def test_saved_folder_and_dataset_keep_their_order(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_list(ROWS)
    backwards = dataset.select(range(99, -1, -1))
    backwards.save_to_disk(tmp_path / "saved", num_shards=3)
    for pool in (open_pool(tmp_path / "saved"), open_pool(backwards)):
        assert pool.ids().to_pylist() == [row["id"] for row in ROWS[::-1]]
        assert pool.rows(SHUFFLED) == [ROWS[99 - row] for row in SHUFFLED]
        written = pq.read_table(pool.write_rows(SHUFFLED, tmp_path / "out"))
        assert written.to_pylist() == pool.rows(SHUFFLED)
        assert written.schema.metadata.keys() == dataset.data.schema.metadata.keys()
        assert pool.dataset(SHUFFLED).features == dataset.features
    assert len(open_pool(tmp_path / "saved").inputs) == 3
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "splits")
    with pytest.raises(InputError, match="holds the splits train, test: name one, such as .*splits/train"):
        open_pool(tmp_path / "splits")
    datasets.DatasetDict(train=dataset).save_to_disk(tmp_path / "one")
    assert len(open_pool(tmp_path / "one")) == 100
    with pytest.raises(InputError, match=r"take a split, such as dataset\['train'\]"):
        open_pool(datasets.DatasetDict(train=dataset))
    with pytest.raises(InputError, match="IterableDataset cannot be read twice"):
        open_pool(dataset.to_iterable_dataset())


def test_dataset_of_chosen_rows(tmp_path):
    pytest.importorskip("datasets")
    path = tmp_path / "pool.jsonl"
    lines = [{"instruction": "q", "output": "a"}, {"messages": TURNS, "late": 1}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = open_pool(path).dataset([1, 0])
    assert dataset[0]["messages"] == TURNS and dataset[0]["instruction"] is None
    assert dataset[1]["output"] == "a" and dataset[1]["late"] is None
    table = open_pool(TABLE).dataset(SHUFFLED)
    assert table["id"] == [ROWS[row]["id"] for row in SHUFFLED]


def test_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"instruction": ["a", None, "c"], "output": ["x", "y", "z"], "score": [1.5, 2.0, None]})
    frame.index = [7, 7, 9]
    pool = open_pool(frame, score_column="score")
    assert pool.status.tolist() == [0, 2, 2]
    assert dict(pool.reasons) == {
        1: "row_id 1: instruction is null, not text",
        2: "row_id 2: there is no score in score",
    }
    assert pool.scores[0] == 1.5 and np.isnan(pool.scores[1:]).all()
    written = pool.write_rows([2, 0], tmp_path / "out")
    assert pandas.read_parquet(written).to_dict("list")["output"] == ["z", "x"]


def test_pandas_columns_of_mixed_types_are_read_row_by_row(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"instruction": ["a", "b", None], "output": ["x", 4, "z"]})
    pool = open_pool(frame)
    assert (
        pool.status.tolist() == [0, 2, 2] and pool.reasons[1] == "row_id 1: the answer (output) is a number, not text"
    )
    assert pool.write_rows([1, 0], tmp_path / "out").read_text().splitlines() == [
        '{"instruction": "b", "output": 4}', '{"instruction": "a", "output": "x"}'
    ]  # fmt: skip


def test_polars(tmp_path):
    polars = pytest.importorskip("polars")
    pool = open_pool(polars.DataFrame([{"instruction": "q", "output": "a"}, {"instruction": "q", "output": None}]))
    assert pool.status.tolist() == [0, 2]
    assert polars.read_parquet(pool.write_rows([0], tmp_path / "out")).rows() == [("q", "a")]


def test_shards_of_different_schemas_are_promoted(tmp_path):
    first = pa.table({"instruction": ["a"], "output": ["x"], "n": pa.array([1], pa.int32())})
    second = pa.table({"output": ["y"], "instruction": ["b"], "n": pa.array([2.5]), "extra": [True]})
    pq.write_table(first, tmp_path / "a.parquet")
    pq.write_table(second, tmp_path / "b.parquet")
    pool = open_pool(str(tmp_path / "*.parquet"))
    written = pq.read_table(pool.write_rows([1, 0], tmp_path / "out"))
    assert written.to_pylist() == [
        {"instruction": "b", "output": "y", "n": 2.5, "extra": True},
        {"instruction": "a", "output": "x", "n": 1.0, "extra": None},
    ]
    pq.write_table(pa.table({"instruction": [1], "output": [[2]]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match="have columns of different types"):
        open_pool(str(tmp_path / "*.parquet"))


def test_times_and_decimals_do_not_stop_the_reading():
    table = pa.table({
        "instruction": ["q"], "output": ["a"], "at": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns", "UTC")),
        "price": [decimal.Decimal("1.25")], "raw": [b"\xff"], "day": pa.array([3], pa.date32()),
    })  # fmt: skip
    pool = open_pool(table, score_column="price")
    assert pool.status.tolist() == [0] and pool.scores.tolist() == [1.25]
    later = table.set_column(2, "at", pa.array([1_700_000_000_123_456_790], pa.timestamp("ns", "UTC")))
    assert open_pool(later, score_column="price").fingerprint != pool.fingerprint


def test_limit_reads_the_first_rows_only(tmp_path):
    pool = open_pool(shards(tmp_path), limit=40)
    assert len(pool) == 40 and [entry.rows for entry in pool.inputs] == [30, 10]
    assert [example.row_id for chunk in pool.chunks() for example in chunk] == list(range(40))
    assert len(open_pool(TABLE, limit=3)) == 3


@pytest.mark.parametrize(("name", "kind"), [("pool.parquet", "Parquet"), ("pool.arrow", "Arrow")])
def test_refuses_what_is_not_columns(tmp_path, name, kind):
    path = tmp_path / name
    for content in (b"", b"hello, not columns at all", parquet(tmp_path).read_bytes()[:-50]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: cannot be read as {kind}"):
            open_pool(path)


def test_a_parquet_file_that_changes_is_noticed(tmp_path):
    path = parquet(tmp_path)
    pool = open_pool(path)
    pq.write_table(TABLE.slice(0, 50), path)
    with pytest.raises(RunFailedError, match="changed while fastsel was using it"):
        pool.examples([0])


def test_refuses_tables_without_rows(tmp_path):
    for empty in (SCHEMA.empty_table(), []):
        with pytest.raises(InputError, match=r"has no rows|is an empty list"):
            open_pool(empty)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"_data_files": []}', '{"_data_files": null}'])
def test_a_saved_data_set_that_is_damaged_is_refused(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(InputError, match=r"state\.json: .*save it again"):
        open_pool(tmp_path)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["gone"]}')
    with pytest.raises(InputError, match=r"gone/state\.json: .*save it again"):
        open_pool(tmp_path)
