"""Tiny random language models that every machine can rebuild bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).with_name("golden")


def build_tiny(kind, window=128):
    """(model, tokenizer): "gpt2" (no start token), "llama" (adds <s>), "llama-without-start".

    Weights come from numpy's legacy generator, whose stream is frozen, in the order of the parameters' names.
    """
    import transformers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    transformers.utils.logging.set_verbosity_error()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN / "tokenizer.json"),
        bos_token="<|endoftext|>" if kind == "gpt2" else "<s>",
        eos_token="<|endoftext|>",
    )
    if kind == "llama":
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    common = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": 0}
    if kind == "gpt2":
        config = GPT2Config(
            n_positions=window, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **common
        )
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=window, tie_word_embeddings=False, **common,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    random = np.random.RandomState(20240613)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.from_numpy(random.standard_normal(tuple(parameter.shape))).float()
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * values if is_norm else 0.3 * values)
    return model.float().eval(), tokenizer


@pytest.fixture(scope="session")
def tiny():
    """build_tiny, each model built once."""
    built = {}

    def get(kind):
        if kind not in built:
            built[kind] = build_tiny(kind)
        return built[kind]

    return get


@pytest.fixture(scope="session")
def golden_rows():
    return json.loads((GOLDEN / "rows.json").read_text())


@pytest.fixture
def golden():
    """What the authors' code computed: losses as float64 arrays with NaN, selections as lists of row numbers."""

    def read(name):
        recorded = json.loads((GOLDEN / f"{name}.json").read_text())
        for key in ("loss_cond", "loss_direct", "ifd_ppl"):
            if key in recorded:
                recorded[key] = np.array([np.nan if x is None else x for x in recorded[key]])
        return recorded

    return read


WORDS = ("<s>", "q", "r", "a", "b", "c", "d", "e")


@pytest.fixture
def bigram():
    """A model of eight words that knows only the word before: bigram({"q": {"a": 0.5}}) says P(a|q) = 1/2.

    What a word's probabilities leave over is shared by the words not named. Attention and MLP add nothing, embeddings
    are unit vectors, and the head holds the logarithms.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    def build(probabilities):
        n = len(WORDS)
        words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="e"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
        config = LlamaConfig(
            vocab_size=n, hidden_size=n, intermediate_size=n, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, max_position_embeddings=64, rms_norm_eps=0.0, tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        table = torch.full((n, n), 1 / n, dtype=torch.float64)
        for before, after in probabilities.items():
            row = table[WORDS.index(before)]
            row[:] = (1 - sum(after.values())) / (n - len(after))
            for word, p in after.items():
                row[WORDS.index(word)] = p
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            for norm in (model.model.norm, model.model.layers[0].input_layernorm):
                norm.weight.fill_(1)
            model.model.layers[0].post_attention_layernorm.weight.fill_(1)
            model.model.embed_tokens.weight.copy_(torch.eye(n))
            model.lm_head.weight.copy_(table.log().T / n**0.5)  # a unit vector's norm grows to sqrt(n)
        return model, tokenizer

    return build


def target_rows(seed, n):
    """Rows of a few words each, with a source and a task."""
    words = ["alpha", "beta", "gamma", "delta", "red", "blue", "green", "one", "two", "three", "cat", "dog"]
    draw = np.random.default_rng(seed)
    texts = [" ".join(draw.choice(words, size=draw.integers(2, 6))) for _ in range(2 * n)]
    return [
        {"instruction": texts[2 * i], "output": texts[2 * i + 1], "source": f"s{i % 2}", "task": f"t{i % 3}"}
        for i in range(n)
    ]


@pytest.fixture(scope="session")
def lora_run(tiny, tmp_path_factory):
    """A pool of 30 rows (row 7 has no answer), 9 target rows of 3 tasks, and a LoRA run of two checkpoints on the pool.

    Returns what methods on gradients are called with, as a dict of pool and options.
    """
    pytest.importorskip("peft")
    import fastsel

    folder = tmp_path_factory.mktemp("lora_run")
    rows = [json.dumps(row) for row in target_rows(0, 30)]
    rows[7] = json.dumps({"instruction": "red", "output": "", "source": "s1"})
    (folder / "pool.jsonl").write_text("\n".join(rows) + "\n")
    common = {"model": tiny("llama"), "template": "none", "max_length": 64, "progress": "none"}
    pool = fastsel.open_pool(folder / "pool.jsonl")
    fastsel.warmup(
        pool, output=folder / "run", fraction=0.5, epochs=2, lora_r=2, rows_a_step=4, learning_rate=1e-2, **common
    )
    return {"pool": pool, "target": target_rows(1, 9), "checkpoints": folder / "run", "leaks": "none", **common}
