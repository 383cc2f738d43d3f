"""Tiny random language models that every machine can rebuild bit for bit."""

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
