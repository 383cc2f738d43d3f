"""A tiny Llama with a LoRA adapter, rows and moments that every machine can rebuild bit for bit."""

import numpy as np
import torch


def tiny_adapter():
    """Weights from numpy's legacy generator, whose stream is frozen, in the order of the parameters' names."""
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    lora = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).eval()
    draw = np.random.RandomState(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = draw.standard_normal(tuple(parameter.shape)) * (0.3 if parameter.ndim > 1 else 0.1)
            parameter.copy_(torch.from_numpy(values) + (1 if name.endswith("norm.weight") else 0))
    return model


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
