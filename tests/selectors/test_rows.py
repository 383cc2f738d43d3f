"""What every selector accepts as a matrix, and what it refuses by row number."""

import numpy as np
import pytest
import torch

from fastsel.errors import UsageError
from fastsel.selectors.rows import Rows, check_k, check_rows, check_values


def matrix(n=20, d=3):
    return np.random.default_rng(0).standard_normal((n, d))


@pytest.mark.parametrize(
    "given",
    [
        lambda x: x,
        lambda x: x.astype(np.float32),
        lambda x: x.astype(">f8"),
        lambda x: x.astype(np.float16),
        lambda x: torch.from_numpy(x),
        lambda x: torch.from_numpy(x).bfloat16(),
        lambda x: x.T.copy().T,
        lambda x: x[::-1],
        lambda x: x.tolist(),
    ],
    ids=["float64", "float32", "big-endian", "float16", "torch", "bfloat16", "columns-first", "reversed", "lists"],
)
def test_reads_what_arrays_come_as(given):
    x = given(matrix())
    wanted = np.asarray(x.double() if isinstance(x, torch.Tensor) else x, dtype=np.float64)
    rows = Rows(x)
    assert (rows.n, rows.d, len(rows)) == (20, 3, 20)
    assert np.array_equal(rows.exact([3, 0]).numpy(), wanted[[3, 0]])
    assert np.array_equal(rows.whole().numpy(), wanted.astype(np.float32))
    assert np.array_equal(rows.take([3, 0]).numpy(), wanted[[3, 0]].astype(np.float32))
    assert [start for start, _ in rows.blocks(8)] == [0, 8, 16]
    assert np.array_equal(np.concatenate([block for _, block in rows.blocks(8)]), wanted.astype(np.float32))


def test_unit_rows_have_length_one_and_zero_rows_stay_zero():
    x = matrix()
    x[4] = 0
    rows = Rows(x, unit=True)
    lengths = np.linalg.norm(rows.exact(slice(0, 20)).numpy(), axis=1)
    assert np.allclose(np.delete(lengths, 4), 1, atol=1e-15) and lengths[4] == 0
    assert np.array_equal(rows.whole().numpy(), rows.exact(slice(0, 20)).numpy().astype(np.float32))
    assert np.array_equal(rows.take(slice(2, 5)).numpy(), rows.whole()[2:5].numpy())


def test_a_mapped_file_is_shared_and_not_copied(tmp_path):
    np.save(tmp_path / "x.npy", matrix().astype(np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    rows = Rows(mapped)
    assert rows.is_mapped
    assert rows.take(slice(0, 5)).data_ptr() == mapped.ctypes.data


def test_refuses_rows_that_are_not_finite_by_number():
    for bad in (np.nan, np.inf):
        x = matrix()
        x[7, 1] = x[9, 0] = bad
        with pytest.raises(UsageError, match="points: row 7 holds NaN or infinity"):
            Rows(x, name="points")


@pytest.mark.parametrize(
    ("x", "message"),
    [(np.zeros(3), "must be a matrix"), (np.zeros((3, 0)), "must be a matrix"), ([["a"]], "real numbers")],
)
def test_refuses_what_is_no_matrix(x, message):
    with pytest.raises(UsageError, match=message):
        Rows(x)


def test_no_rows_are_a_matrix_too():
    assert Rows(np.zeros((0, 3)), unit=True).whole().shape == (0, 3)


def test_k_rows_and_values():
    assert check_k(30, 20) == 20 and check_k(np.int64(3), 20) == 3
    for k in (-1, 2.5, True):
        with pytest.raises(UsageError, match="k"):
            check_k(k, 20)
    assert check_rows(None, 20, "initial").dtype == np.int64
    assert check_rows([4, 2], 20, "initial").tolist() == [4, 2]
    for rows, message in (
        ([20], "no row 20"),
        ([-1], "no row -1"),
        ([1, 1], "row 1 stands there twice"),
        ([0.5], "row"),
    ):
        with pytest.raises(UsageError, match=message):
            check_rows(rows, 20, "initial")
    assert check_values(None, 2, "weights").tolist() == [1, 1]
    assert check_values(torch.tensor([0.5, 2]), 2, "weights").tolist() == [0.5, 2]
    for values, message in (([1, -1], "row 1 has -1.0"), ([np.nan, 1], "row 0 has nan"), ([1], "must be")):
        with pytest.raises(UsageError, match=message):
            check_values(values, 2, "weights", least=0)
