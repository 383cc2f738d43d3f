"""Answer losses of a pool: batches, windows, stores, interruptions."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastsel.errors import InputError, UsageError
from fastsel.features import answer_scorer, batches, token_stats
from fastsel.features.answer_scorer import AnswerScorer
from fastsel.features.answer_tokens import CONDITIONED, DIRECT, RowTokens, ScoredSequence
from fastsel.features.batches import Shard, cut_into_batches
from fastsel.features.token_stats import answer_losses, window_of
from fastsel.io import bundled_pool_path, open_pool
from fastsel.io.templates import ALPACA
from fastsel.models.loading import load_model
from fastsel.models.packed import PackedForward
from fastsel.store import FeatureStore

N_ROWS = 24


@pytest.fixture(scope="module")
def loaded(tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=600,
    )  # fmt: skip
    torch.manual_seed(3)
    return load_model((LlamaForCausalLM(config).eval(), tokenizer))


@pytest.fixture(scope="module")
def pool():
    return open_pool(bundled_pool_path(), limit=N_ROWS)


def score(pool, loaded, **options):
    options = {"template": ALPACA, "max_length": 400, "progress": "none", **options}
    return answer_losses(pool, loaded, **options)


@pytest.fixture(scope="module")
def expected(pool, loaded):
    return score(pool, loaded)


@pytest.mark.parametrize("batch_tokens", [1, 500, 3000, 100_000])
def test_law_the_budget_of_a_batch_changes_nothing(pool, loaded, expected, batch_tokens):
    got = score(pool, loaded, batch_tokens=batch_tokens)
    for of_pass in (CONDITIONED, DIRECT):
        np.testing.assert_allclose(got.mean(of_pass), expected.mean(of_pass), rtol=1e-5)
        np.testing.assert_array_equal(got.n_scored[of_pass], expected.n_scored[of_pass])


def test_law_the_order_and_the_company_of_rows_change_nothing(pool, loaded, expected):
    rows = [json.loads(line) for line in bundled_pool_path().read_text().splitlines()[:N_ROWS]]
    order = np.random.default_rng(0).permutation(N_ROWS)[: N_ROWS // 2]
    got = score(open_pool([rows[i] for i in order]), loaded)
    np.testing.assert_allclose(got.mean(CONDITIONED), expected.mean(CONDITIONED)[order], rtol=1e-5)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_implementations_agree(pool, loaded, expected, implementation):
    got = score(pool, loaded, implementation=implementation)
    np.testing.assert_allclose(got.mean(DIRECT), expected.mean(DIRECT), rtol=1e-5)


def test_every_row_is_accounted_for(pool, loaded, expected):
    assert expected.status.shape == (N_ROWS,)
    scored = np.isfinite(expected.nll[CONDITIONED])
    np.testing.assert_array_equal(scored, expected.has_score)
    assert set(expected.reasons) == set(np.flatnonzero(expected.status).tolist())
    assert (expected.n_scored[CONDITIONED] == expected.n_scored[DIRECT]).all()
    assert expected.tokens == sum(row.size for row in all_rows(pool, loaded))


def all_rows(pool, loaded):
    tokenise = token_stats.AnswerTokenizer(loaded.tokenizer, ALPACA, max_length=400)
    return tokenise(pool.examples(range(len(pool))))


def test_a_reason_names_the_line_of_its_row(loaded, tmp_path):
    rows = [
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "output": ""},
        {"instruction": "q" * 600, "output": "b"},
    ]
    path = tmp_path / "pool.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    losses = score(open_pool(path), loaded, max_length=400)
    assert dict(losses.reasons) == {
        1: "line 3: the answer (output) is empty",
        2: "line 5: the prompt fills max_length=400 and leaves no answer token",
    }
    losses.drop(np.array([True, False, True]), "not wanted")
    assert dict(losses.reasons) == {
        0: "line 1: not wanted", 1: "line 3: the answer (output) is empty", 2: "line 5: not wanted"
    }  # fmt: skip
    assert len(losses.reasons) == 3 and losses.reasons.get(7) is None


def test_equal_rows_have_equal_bits_and_are_scored_once(loaded, monkeypatch):
    rows = [{"instruction": f"q{i % 3}", "output": "an answer " * (i % 3 + 1)} for i in range(30)]
    seen = []
    counted = answer_scorer._sums
    monkeypatch.setattr(
        answer_scorer, "_sums", lambda sequences, *rest: seen.extend(sequences) or counted(sequences, *rest)
    )
    losses = score(open_pool(rows), loaded, batch_tokens=64)
    assert len(seen) == 6
    assert len({nll.tobytes() for nll in losses.nll[CONDITIONED]}) == 3


class Stopped(Exception):
    pass


def test_interrupted_and_resumed_equals_uninterrupted(pool, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "SHARD_TOKENS", 1500)
    whole = score(pool, loaded, store=tmp_path / "whole")
    n_shards = len(json.loads((tmp_path / "whole" / "index.json").read_text())["shards"])
    assert n_shards >= 4
    scored = []
    genuine = AnswerScorer.__call__

    def stops_in_the_third(*arguments):
        if len(scored) == 2:
            raise Stopped
        scored.append(arguments[-1])
        return genuine(*arguments)

    monkeypatch.setattr(AnswerScorer, "__call__", stops_in_the_third)
    with pytest.raises(Stopped):
        score(pool, loaded, store=tmp_path / "parts")
    (tmp_path / "parts" / "00000009-00000011.npy.part").write_bytes(b"half a shard")
    assert len(list((tmp_path / "parts").glob("*.npy"))) == 2
    scored.clear()
    monkeypatch.setattr(batches, "SHARD_TOKENS", 10**9)  # the plan is kept: this no longer decides
    monkeypatch.setattr(AnswerScorer, "__call__", lambda *a: (scored.append(a[-1]), genuine(*a))[1])
    resumed = score(pool, loaded, store=tmp_path / "parts")
    assert len(scored) == n_shards - 2
    for of_pass in (CONDITIONED, DIRECT):
        assert resumed.nll[of_pass].tobytes() == whole.nll[of_pass].tobytes()
    for file in sorted((tmp_path / "whole").iterdir()):
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes(), file.name


def test_a_finished_store_needs_no_forward(pool, loaded, tmp_path, monkeypatch):
    first = score(pool, loaded, store=tmp_path)
    monkeypatch.setattr(answer_scorer, "_sums", lambda *_: pytest.fail("a forward ran"))
    assert score(pool, loaded, store=tmp_path).nll[DIRECT].tobytes() == first.nll[DIRECT].tobytes()


@pytest.mark.parametrize("change", [{"max_length": 300}, {"template": "none"}, {"passes": (CONDITIONED,)}])
def test_refuses_a_store_of_other_options(pool, loaded, tmp_path, change):
    score(pool, loaded, store=tmp_path)
    if "template" in change:
        from fastsel.io.templates import NONE

        change = {"template": NONE}
    with pytest.raises(InputError, match=f"{next(iter(change))}: .* there, .* now"):
        score(pool, loaded, store=tmp_path, **change)


def test_refuses_a_store_that_other_code_filled(pool, loaded, tmp_path, monkeypatch):
    """Other code gives other last bits: half of each in one file would be neither."""
    losses = score(pool, loaded, store=tmp_path)
    ran = losses.provenance["implementations"]
    assert set(ran) == {"linear_token_stats", "tree_attention"}
    assert json.loads((tmp_path / "index.json").read_text())["fingerprint"]["implementations"] == ran
    elsewhere = dict.fromkeys(ran, "native-elsewhere")
    genuine = PackedForward.__init__

    def on_another_machine(self, *arguments):
        genuine(self, *arguments)
        self.implementations = elsewhere

    monkeypatch.setattr(PackedForward, "__init__", on_another_machine)
    with pytest.raises(InputError) as refused:
        score(pool, loaded, store=tmp_path)
    assert f"  implementations: {json.dumps(ran)} there, {json.dumps(elsewhere)} now" in str(refused.value).splitlines()


def test_refuses_a_store_that_another_process_uses(pool, loaded, tmp_path):
    score(pool, loaded, store=tmp_path)
    fingerprint = json.loads((tmp_path / "index.json").read_text())["fingerprint"]
    with FeatureStore(tmp_path, fingerprint), pytest.raises(InputError, match="is in use by process"):
        score(pool, loaded, store=tmp_path)


def test_refuses_a_store_of_another_pool(pool, loaded, tmp_path):
    score(pool, loaded, store=tmp_path)
    with pytest.raises(InputError, match="pool: .* there, .* now"):
        score(open_pool(bundled_pool_path(), limit=N_ROWS - 1), loaded, store=tmp_path)


class Backwards:
    """An executor that runs the last shard first and answers in order."""

    def __init__(self):
        self.shards = []

    def map_shards(self, function, shards):
        self.shards = list(shards)
        return [function(shard) for shard in reversed(self.shards)][::-1]


def test_an_executor_runs_the_shards(pool, loaded, expected, monkeypatch):
    monkeypatch.setattr(batches, "SHARD_TOKENS", 1500)
    executor = Backwards()
    got = score(pool, loaded, executor=executor)
    np.testing.assert_allclose(got.nll[CONDITIONED], expected.nll[CONDITIONED], rtol=1e-5)
    starts, stops = zip(*((shard.start, shard.stop) for shard in executor.shards), strict=True)
    assert starts[0] == 0 and stops[-1] == N_ROWS and starts[1:] == stops[:-1]


def test_progress_counts_every_token_once(pool, loaded, expected, capsys):
    score(pool, loaded, progress="json")
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert last["done"] == last["total"] == expected.tokens and last["unit"] == "tok"


def sequences(*sizes):
    return [ScoredSequence(CONDITIONED, [1] * size, 1) for size in sizes]


def test_batches_are_filled_from_short_to_long_and_keep_a_row_together():
    rows = [RowTokens(0, sequences=sequences(6, 3)), RowTokens(1, sequences=sequences(2)),
            RowTokens(2, sequences=sequences(30, 4)), RowTokens(3, sequences=sequences(5))]  # fmt: skip
    cut = [[(row, len(s.ids)) for row, s in batch] for batch in cut_into_batches(rows, 10)]
    assert cut == [[(1, 2), (3, 5)], [(0, 6), (0, 3)], [(2, 30)], [(2, 4)]]


def test_a_plan_has_equal_shards_and_leaves_no_row_out(pool, loaded, monkeypatch):
    monkeypatch.setattr(batches, "SHARD_TOKENS", 1500)
    tokenise = token_stats.AnswerTokenizer(loaded.tokenizer, ALPACA, max_length=400)
    shards = batches.plan_shards(pool, tokenise)
    assert [shard.start for shard in shards[1:]] == [shard.stop for shard in shards[:-1]]
    assert shards[0].start == 0 and shards[-1].stop == N_ROWS
    assert all(shard.tokens <= 1500 or shard.stop - shard.start == 1 for shard in shards)
    unusable = open_pool([{"instruction": "q", "output": ""}])
    assert batches.plan_shards(unusable, tokenise) == [Shard(0, 1, 0)]


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_no_score(loaded, monkeypatch, loss):
    genuine = answer_scorer._sums

    def poisoned(batch, *rest):
        sums = genuine(batch, *rest)
        sums[0] = loss
        return sums

    monkeypatch.setattr(answer_scorer, "_sums", poisoned)
    losses = score(open_pool([{"instruction": "q", "output": "a"}, {"instruction": "q", "output": "long"}]), loaded)
    assert losses.has_score.tolist() == [False, True]
    assert losses.reasons[0] == "row_id 0: the model's loss is not a finite number"
    assert np.isnan(losses.mean(DIRECT)[0])


def test_a_forward_that_fails_is_an_error_and_no_score(pool, loaded, monkeypatch):
    """Other tools turn it into a ratio of 0, which their filters keep."""

    def out_of_memory(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(answer_scorer, "_sums", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        score(pool, loaded)


def test_windows(loaded):
    assert window_of(loaded, None, papers=512) == 512
    assert window_of(loaded, None, papers=1024) == 600
    with pytest.raises(UsageError, match="max_length=601 must be from 2 to 600"):
        window_of(loaded, 601, papers=512)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"overflow": "cut"}, "overflow='cut' is not known; it is one of: truncate, skip, error"),
        ({"turns": "first"}, "turns='first' is not known; it is one of: all, last"),
        ({"rule": "cherry", "overflow": "skip"}, "overflow='skip': released code cuts long rows in its own way"),
        ({"batch_tokens": 0}, "batch_tokens=0 must be at least 1"),
    ],
)
def test_refuses_unknown_options(pool, loaded, options, message):
    with pytest.raises(UsageError, match=message):
        score(pool, loaded, **options)
