import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from fastsel.models.forest import filled_up, pack

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=30)


@hypothesis.given(sequences=st.lists(tokens, max_size=12), share=st.booleans())
def test_law_packing_keeps_every_sequence(sequences, share):
    batch = pack(sequences, share_prefixes=share)
    assert batch.segments.n_tokens == len(batch.token_ids) <= sum(map(len, sequences))
    if not share:
        assert batch.token_ids.tolist() == sum(sequences, [])
    for index, sequence in enumerate(sequences):
        rows = batch.rows(index, 0, len(sequence))
        assert batch.token_ids[rows].tolist() == sequence == batch.sequence(index).tolist()
        assert batch.position_ids[rows].tolist() == list(range(len(sequence)))
        middle = batch.rows(index, len(sequence) // 3, len(sequence) - 1)
        assert torch.equal(middle, rows[len(sequence) // 3 : len(sequence) - 1])
    again = pack(sequences, share_prefixes=share)
    assert torch.equal(batch.token_ids, again.token_ids) and batch.segments.parent_list == again.segments.parent_list


def test_shares_what_is_worth_it():
    template, brief = list(range(40)), [90, 91]
    batch = pack([template + [50, 51], brief + [60], template + [52], brief + [61, 62]])
    assert batch.segments.parent_list == [-1, 0, 0, -1, -1]  # two shared tokens make no parent
    assert batch.segments.n_tokens == 40 + 2 + 1 + 3 + 4
    assert len(pack([[1, 2, 3]] * 5).segments) == 1  # repeats are computed once, however short


def test_refuses_empty_sequences_and_tokens_that_are_not_there():
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        pack([[1], []])
    batch = pack([[1, 2, 3]])
    for start, stop in ((0, 4), (-1, 2)):
        with pytest.raises(IndexError, match=f"sequence 0 has no tokens {start}:{stop}"):
            batch.rows(0, start, stop)


@pytest.mark.parametrize("multiple", [1, 2, 5, 64])
def test_filling_up_adds_tokens_that_nobody_reads(multiple):
    batch = pack([[1, 2, 3, 4, 5], [1, 2, 3, 6], [7]])
    full = filled_up(batch, multiple)
    n, total = batch.segments.n_tokens, full.segments.n_tokens
    assert total % multiple == 0 and total - n < multiple and len(full.token_ids) == total
    assert full.token_ids[:n].equal(batch.token_ids) and full.position_ids[:n].equal(batch.position_ids)
    assert int(full.position_ids.max()) == int(batch.position_ids.max()), "a filler is longer than the longest sequence"
    for index, length in enumerate((5, 4, 1)):
        assert full.rows(index, 0, length).equal(batch.rows(index, 0, length))
        assert full.sequence(index).equal(batch.sequence(index))
    assert all(parent == -1 for parent in full.segments.parent_list[len(batch.segments) :])
