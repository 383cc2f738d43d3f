"""Packed forwards of tiny random models of each architecture against separate forwards by transformers alone."""

import random
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from fastsel.errors import FastselWarning, InputError
from fastsel.models.loading import load_model
from fastsel.models.packed import PackedForward, pack

transformers = pytest.importorskip("transformers")

SMALL = dict(vocab_size=160, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             max_position_embeddings=128)  # fmt: skip
GROUPED = SMALL | dict(num_key_value_heads=2)
GEMMA = GROUPED | dict(head_dim=16)
# Windows are far shorter than the sequences, and the probe's own sequences are as well.
ARCHITECTURES = {
    "llama": ("Llama", GROUPED),
    "llama_biased": ("Llama", SMALL | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", GROUPED),
    "qwen2_window": ("Qwen2", GROUPED | dict(use_sliding_window=True, sliding_window=9, max_window_layers=2)),
    "qwen3": ("Qwen3", GROUPED | dict(head_dim=8)),
    "mistral": ("Mistral", GROUPED | dict(sliding_window=None)),
    "mistral_window": ("Mistral", GROUPED | dict(sliding_window=7)),
    "phi": ("Phi", SMALL | dict(partial_rotary_factor=0.5)),
    "phi3": ("Phi3", GROUPED | dict(pad_token_id=0)),
    "phi3_window": ("Phi3", GROUPED | dict(pad_token_id=0, sliding_window=8)),
    "gpt2": ("GPT2", dict(vocab_size=160, n_embd=32, n_layer=3, n_head=4, n_positions=128)),
    "gpt_neox": ("GPTNeoX", SMALL),
    "opt": ("OPT", dict(vocab_size=160, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
                        max_position_embeddings=128, word_embed_proj_dim=24)),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma2", GEMMA | dict(sliding_window=9, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
                                      query_pre_attn_scalar=11)),
    "gemma3": ("Gemma3", GEMMA | dict(sliding_window=6, sliding_window_pattern=2, query_pre_attn_scalar=20)),
    "cohere": ("Cohere", GROUPED | dict(logit_scale=0.25)),
    "granite": ("Granite", GROUPED | dict(logits_scaling=8.0, attention_multiplier=0.2, residual_multiplier=0.5)),
    "mixtral": ("Mixtral", GROUPED | dict(num_local_experts=4)),
}  # fmt: skip
PADDED = {
    "bloom": ("Bloom", dict(vocab_size=160, hidden_size=32, n_layer=3, n_head=4), "AttentionInterface"),
    "gpt_oss": ("GptOss", GROUPED | dict(head_dim=8, num_local_experts=4, sliding_window=6), "s_aux"),
    "mpt": ("Mpt", dict(vocab_size=160, d_model=32, n_layers=2, n_heads=4, max_seq_len=128), "AttentionInterface"),
    "mamba": ("Mamba", dict(vocab_size=160, hidden_size=32, num_hidden_layers=2, state_size=4), "linear_attention"),
}  # fmt: skip


def tokenizer(text):
    raise AssertionError("no test here turns text into tokens")


def tiny_model(family, sizes, seed=0):
    """A random model whose weights are large enough that a wrong mask changes every output."""
    name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, name)(**sizes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else 2.0 * parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def load(family, sizes):
    return load_model((tiny_model(family, sizes), tokenizer), device="cpu")


def three_level_sequences(seed=0):
    """Prompts with shared beginnings of two lengths, a lone sequence, one that is a prefix of another, a repeat."""
    rng = random.Random(seed)
    draw = lambda n: [rng.randrange(1, 160) for _ in range(n)]  # noqa: E731
    prompt, answer = draw(23), draw(14)
    sequences = [prompt + answer + draw(9), prompt + answer + draw(17), prompt + draw(30), draw(40), prompt + answer]
    return [*sequences, list(sequences[0]), draw(1)]


def separate_hidden_states(model, sequence):
    with torch.inference_mode():
        return model.base_model(input_ids=torch.tensor([sequence])).last_hidden_state[0]


def relative_error(ours, theirs):
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


@pytest.mark.parametrize("implementation", ["native", "torch"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_equals_separate_forwards(name, implementation):
    loaded = load(*ARCHITECTURES[name])
    forward = PackedForward(loaded, implementation)
    assert (forward.path, forward.reason) == ("packed", None)
    sequences = three_level_sequences()
    batch = pack(sequences)
    depths = [len(batch.segments.path(s)) for s in range(len(batch.segments))]
    assert max(depths) == 3
    for index, sequence in enumerate(sequences):
        ours = forward.hidden_states(batch, batch.rows(index, 0, len(sequence)))
        tolerance = 1e-4 if name == "mixtral" else 2e-5  # a router that weighs experts amplifies rounding
        assert relative_error(ours, separate_hidden_states(loaded.model, sequence)) < tolerance
    assert loaded.model.config._attn_implementation == "eager"  # left as it was


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere", "granite", "opt"])
def test_head_gives_the_models_own_logits(name):
    loaded = load(*ARCHITECTURES[name])
    forward = PackedForward(loaded)
    sequence = three_level_sequences()[0]
    with torch.inference_mode():
        expected = loaded.model(input_ids=torch.tensor([sequence])).logits[0]
    batch = pack([sequence])
    head = forward.head
    logits = forward.hidden_states(batch, batch.rows(0, 0, len(sequence))) @ head.weight.T * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (head.softcap == 3.0) == (name == "gemma2")


@pytest.mark.parametrize("name", PADDED)
def test_other_models_are_padded_and_say_why(name):
    family, sizes, reason = PADDED[name]
    loaded = load(family, sizes)
    with pytest.warns(FastselWarning, match="sequences are padded instead") as caught:
        forward = PackedForward(loaded)
    assert len(caught) == 1
    assert forward.path == "padded" and reason in forward.reason
    sequences = three_level_sequences()
    batch = pack(sequences)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        for index, sequence in enumerate(sequences):
            ours = forward.hidden_states(batch, batch.rows(index, 2, len(sequence)))
            assert len(ours) == max(0, len(sequence) - 2)
            if len(ours):
                assert relative_error(ours, separate_hidden_states(loaded.model, sequence)[2:]) < 5e-5
    everything = torch.cat([batch.rows(index, 0, len(sequence)) for index, sequence in enumerate(sequences)])
    expected = torch.cat([separate_hidden_states(loaded.model, sequence) for sequence in sequences])
    assert relative_error(forward.hidden_states(batch, everything), expected) < 5e-5


def test_rotations_that_depend_on_the_longest_sequence_are_not_mixed():
    """Beyond the original length, dynamic RoPE turns all tokens of a forward by the longest sequence in it."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    loaded = load("Llama", GROUPED | dict(rope_parameters=rope))
    forward = PackedForward(loaded)
    sequences = [list(range(1, 30)), list(range(1, 100)), list(range(3, 53))]
    batch = pack(sequences)
    for index, sequence in enumerate(sequences):
        ours = forward.hidden_states(batch, batch.rows(index, 29 if index == 1 else 0, len(sequence)))
        theirs = separate_hidden_states(loaded.model, sequence)[29 if index == 1 else 0 :]
        assert relative_error(ours, theirs) < 2e-5


def test_refuses_models_that_look_ahead():
    config = transformers.BertConfig(vocab_size=160, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=48, is_decoder=False)  # fmt: skip
    torch.manual_seed(0)
    loaded = load_model((transformers.BertLMHeadModel(config), tokenizer), device="cpu")
    with pytest.raises(InputError, match="not causal"):
        PackedForward(loaded)


def test_refuses_heads_that_do_something_unknown():
    model = tiny_model("Llama", GROUPED)
    model.lm_head.register_forward_hook(lambda module, args, logits: logits**3)
    with pytest.raises(InputError, match="its head does something unknown"):
        PackedForward(load_model((model, tokenizer), device="cpu"))


def test_refuses_sequences_longer_than_the_model():
    forward = PackedForward(load(*ARCHITECTURES["gpt2"]))
    batch = pack([[1] * 129])
    with pytest.raises(ValueError, match="has 129 tokens, .* takes at most 128"):
        forward.hidden_states(batch, batch.rows(0, 0, 1))


@pytest.fixture(scope="module")
def llama():
    return PackedForward(load(*ARCHITECTURES["llama"]))


def losses(forward, sequences, batches, **options):
    """Mean negative log-likelihood of each sequence, from batches of sequence numbers."""
    found = torch.empty(len(sequences), dtype=torch.float64)
    for batch_members in batches:
        batch = pack([sequences[i] for i in batch_members], **options)
        for place, i in enumerate(batch_members):
            length = len(sequences[i])
            hidden = forward.hidden_states(batch, batch.rows(place, 0, length - 1))
            logits = (hidden @ forward.head.weight.T).double()
            targets = torch.tensor(sequences[i][1:])
            found[i] = torch.nn.functional.cross_entropy(logits, targets)
    return found


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(seed=st.integers(0, 10**6), size=st.integers(1, 6))
def test_law_batches_order_and_sharing_change_nothing(llama, seed, size):
    sequences = three_level_sequences(seed)[:-1]
    expected = losses(llama, sequences, [[i] for i in range(len(sequences))], share_prefixes=False)
    order = random.Random(seed).sample(range(len(sequences)), len(sequences))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    for share_prefixes in (True, False):
        found = losses(llama, sequences, batches, share_prefixes=share_prefixes)
        assert ((found - expected).abs() / expected).max() < 1e-5


def test_law_the_same_batch_gives_the_same_bits(llama):
    batch = pack(three_level_sequences())
    rows = torch.arange(batch.segments.n_tokens)
    assert torch.equal(llama.hidden_states(batch, rows), llama.hidden_states(batch, rows))
