"""Rewards are kept by batch, survive a torn last entry, and belong to one computation."""

import numpy as np
import pytest

from fastsel.errors import InputError
from fastsel.features.kept_rewards import LOG, KeptRewards


class Asked:
    """rows -> rows / 7, NaN for row 3; counts what was asked for."""

    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        self.batches.append(rows.tolist())
        return np.where(rows == 3, np.nan, rows / 7)


def rows(*numbers):
    return np.array(numbers, np.int64)


def ask(folder, batches, fingerprint=None):
    """(values, batches that were computed, what on_rows was told)."""
    asked, told = Asked(), []
    with KeptRewards(asked, folder, fingerprint or {"model": 1}, lambda n, is_kept: told.append((n, is_kept))) as kept:
        values = [kept(batch).tolist() for batch in batches]
    return values, asked.batches, told


def test_a_batch_is_computed_once(tmp_path):
    batches = [rows(1, 2), rows(3), rows(5, 4, 6)]
    first, computed, told = ask(tmp_path, batches)
    assert computed == [[1, 2], [3], [5, 4, 6]] and told == [(2, False), (1, False), (3, False)]
    again, computed, told = ask(tmp_path, batches)
    assert computed == [] and told == [(2, True), (1, True), (3, True)]
    np.testing.assert_array_equal(np.concatenate(again), np.concatenate(first))
    assert np.isnan(again[1][0]) and again[0] == [1 / 7, 2 / 7]


def test_another_batch_of_the_same_rows_is_computed(tmp_path):
    """Its last bits may differ, as other rows went through the model with it."""
    ask(tmp_path, [rows(1, 2)])
    assert ask(tmp_path, [rows(2, 1), rows(1), rows(1, 2)])[1] == [[2, 1], [1]]


@pytest.mark.parametrize("cut", [1, 8, 20, 39, 47])
def test_a_torn_entry_is_computed_again_and_the_log_goes_on(tmp_path, cut):
    ask(tmp_path, [rows(1, 2), rows(4, 5)])
    log = (tmp_path / LOG).read_bytes()
    assert len(log) == 2 * 48
    (tmp_path / LOG).write_bytes(log[:-cut])
    assert ask(tmp_path, [rows(1, 2), rows(4, 5)])[1] == [[4, 5]]
    assert (tmp_path / LOG).read_bytes() == log
    assert ask(tmp_path, [rows(1, 2), rows(4, 5)])[1] == []


def test_a_changed_byte_is_not_believed(tmp_path):
    ask(tmp_path, [rows(1, 2), rows(4, 5)])
    log = bytearray((tmp_path / LOG).read_bytes())
    log[30] ^= 1  # a value of the first batch
    (tmp_path / LOG).write_bytes(log)
    assert ask(tmp_path, [rows(1, 2), rows(4, 5)])[1] == [[1, 2], [4, 5]]


def test_nothing_is_kept_without_a_folder():
    assert ask(None, [rows(1), rows(1)])[1] == [[1], [1]]


def test_refuses_another_computation(tmp_path):
    ask(tmp_path, [rows(1)])
    with pytest.raises(InputError, match="(?s)another computation.*model: 1 there, 2 now"):
        ask(tmp_path, [rows(1)], {"model": 2})
