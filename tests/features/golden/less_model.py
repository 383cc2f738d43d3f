"""A tiny Llama with a LoRA adapter, rows and moments that every machine can rebuild bit for bit."""

import numpy as np
import torch


def adapted(width, vocabulary, r, *, seed, spread, **shape):
    """A Llama of two layers with LoRA on q, k, v, o, filled in the order of the parameters' names.

    Values come from numpy's legacy generator, whose stream is frozen, times spread(name, parameter).
    """
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=2, max_position_embeddings=64, **shape
    )
    lora = peft.LoraConfig(r=r, lora_alpha=4 * r, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).eval()
    draw = np.random.RandomState(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = draw.standard_normal(tuple(parameter.shape)) * spread(name, parameter)
            parameter.copy_(torch.from_numpy(values) + (1 if name.endswith("norm.weight") else 0))
    return model


def tiny_adapter():
    """Every matrix far from 0."""
    return adapted(
        12, 50, 2, seed=0, spread=lambda name, parameter: 0.3 if parameter.ndim > 1 else 0.1,
        intermediate_size=20, num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip


def rows():
    """(token ids, how many of them are the prompt)."""
    draw = np.random.RandomState(1)
    return [(draw.randint(1, 50, size=length).tolist(), n_prompt) for length, n_prompt in ((9, 3), (20, 11), (33, 5))]


def moments(model):
    """(exp_avg, exp_avg_sq), flat, float32."""
    p = sum(x.numel() for name, x in model.named_parameters() if "lora_" in name)
    draw = np.random.RandomState(2)
    first, second = draw.standard_normal(p) * 1e-3, draw.random_sample(p) * 1e-6
    return torch.from_numpy(first).float(), torch.from_numpy(second).float()


K, N_ROWS = 64, 24  # two groups of the projection's sixteen


def warmed_up(dtype):
    """(model, exp_avg, exp_avg_sq): two layers of 32, p = 2,048, after ten steps of AdamW at LESS's rate; in a type."""
    model = adapted(
        32, 300, 4, seed=3, intermediate_size=64, num_attention_heads=4,
        spread=lambda name, parameter: 0.0 if "lora_B" in name else 0.25 if "lora_A" in name else 0.02,
    )  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-5, weight_decay=0)
    for step in range(10):
        optimizer.zero_grad()
        for ids, n_prompt in longer_rows(4, seed=10 + step):
            (model(**as_batch(ids, n_prompt)).loss / 4).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    kept = (torch.cat([optimizer.state[p][m].view(-1) for p in trained]) for m in ("exp_avg", "exp_avg_sq"))
    model.zero_grad(set_to_none=True)
    return model.to(dtype), *kept


def longer_rows(n=N_ROWS, seed=4):
    """(token ids, how many of them are the prompt) of n rows of 10 to 49 tokens."""
    draw = np.random.RandomState(seed)
    return [(draw.randint(1, 300, size=10 + 7 * i % 40).tolist(), 5) for i in range(n)]


def as_batch(ids, n_prompt):
    """What a Hugging Face model takes."""
    token_ids = torch.tensor([ids])
    labels = token_ids.clone()
    labels[0, :n_prompt] = -100
    return {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids), "labels": labels}
