"""Packed LoRA gradients of tiny random models against autograd through peft's own layers, one sequence at a time."""

import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fastsel.errors import FastselWarning, InputError
from fastsel.models import lora_forward
from fastsel.models.frozen_linear import ROWS_MULTIPLE
from fastsel.models.loading import load_model
from fastsel.models.lora_forward import LabelledSequence, LoraForward

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SMALL = dict(vocab_size=160, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=128)  # fmt: skip
GROUPED = SMALL | dict(num_key_value_heads=2)
GEMMA = GROUPED | dict(head_dim=16)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# name: family, sizes, target modules. Windows are far shorter than the sequences.
ARCHITECTURES = {
    "llama": ("Llama", GROUPED, ATTENTION),
    "llama_biased": ("Llama", SMALL | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True), "all-linear"),
    "qwen2": ("Qwen2", GROUPED, "all-linear"),
    "qwen3": ("Qwen3", GROUPED | dict(head_dim=8), ATTENTION),
    "mistral_window": ("Mistral", GROUPED | dict(sliding_window=7), ["q_proj", "v_proj", "down_proj"]),
    "phi": ("Phi", SMALL | dict(partial_rotary_factor=0.5), ["q_proj", "dense", "fc2"]),
    "phi3": ("Phi3", GROUPED | dict(pad_token_id=0), ["qkv_proj", "o_proj"]),
    "gpt2": ("GPT2", dict(vocab_size=160, n_embd=32, n_layer=3, n_head=4, n_positions=128), "all-linear"),
    "opt": ("OPT", dict(vocab_size=160, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                        max_position_embeddings=128, word_embed_proj_dim=24), ["q_proj", "v_proj"]),
    "gemma": ("Gemma", GEMMA, ["q_proj", "gate_proj"]),
    "gemma2": ("Gemma2", GEMMA | dict(sliding_window=9, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
                                      query_pre_attn_scalar=11), ATTENTION),
    "granite": ("Granite", GROUPED | dict(logits_scaling=8.0, attention_multiplier=0.2), ATTENTION),
}  # fmt: skip
ONE_BY_ONE = {
    "bloom": ("Bloom", dict(vocab_size=160, hidden_size=32, n_layer=2, n_head=4), ["query_key_value"]),
    "gpt_oss": ("GptOss", GROUPED | dict(head_dim=8, num_local_experts=4, sliding_window=6), ATTENTION),
}


def tokenizer(text):
    raise AssertionError("no test here turns text into tokens")


def tiny_model(family, sizes, seed=0):
    """A random model whose weights are large enough that a wrong mask changes every gradient."""
    config = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(seed)
    eager = family in ("Gemma2", "GptOss", "Bloom")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager" if eager else "sdpa")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def adapted(family, sizes, target_modules, *, dtype=torch.float32, seed=0, **options):
    options = dict(r=3, lora_alpha=5, lora_dropout=0.3) | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft notices GPT-2's layers
        config = peft.LoraConfig(target_modules=target_modules, task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(tiny_model(family, sizes), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.to(dtype).eval()


def load(model):
    return load_model((model, tokenizer), device="cpu")


def forward_of(model):
    """The base model inside has no names of the peft model; pairs are unwrapped by load_model."""
    from dataclasses import replace

    return LoraForward(replace(load(model), model=model))


def some_examples(seed=0, sizes=((31, 20), (12, 1), (50, 44), (9, 8), (40, 25))):
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length, first in sizes:
        ids = torch.randint(1, 160, (length,), generator=generator).tolist()
        examples.append([LabelledSequence(ids, list(range(first, length)))])
    # Labels with gaps, nothing after the last of them, and an example of two sequences.
    ids = torch.randint(1, 160, (30,), generator=generator).tolist()
    examples.append([LabelledSequence(ids, [3, 4, 11, 25])])
    examples.append([LabelledSequence(ids[:14], [5, 13]), LabelledSequence(ids[9:], [1, 2, 20])])
    return examples


def dense(forward, examples, **options):
    """[n, p] float64 gradients, [n] losses."""
    found = torch.zeros(len(examples), forward.n_parameters, dtype=torch.float64)

    def consumer(part):
        assert len(part.x) == len(part.delta) == part.offsets[-1]
        lora_forward._dense(found, part)

    return found, forward.run(examples, consumer, **options)


def one_at_a_time(model, examples):
    """[n, p], [n]: by autograd through peft's layers, cross-entropy in the type of the logits or float32."""
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert all(".lora_A." in a and ".lora_B." in b for a, b in zip(names[::2], names[1::2], strict=True))
    rows, losses = [], []
    for parameter in parameters:
        parameter.requires_grad_(True)
    for example in examples:
        total, count = 0.0, 0
        for sequence in example:
            logits = model(input_ids=torch.tensor([sequence.ids])).logits[0]
            labelled = torch.tensor(sequence.labelled)
            targets = torch.tensor(sequence.ids)[labelled]
            total = total + torch.nn.functional.cross_entropy(logits[labelled - 1], targets, reduction="sum")
            count += len(labelled)
        gradients = torch.autograd.grad(total / count, parameters, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
        rows.append(torch.cat([g.reshape(-1) for g in filled]).double())
        losses.append(float(total.detach() / count))
    return torch.stack(rows), torch.tensor(losses, dtype=torch.float64)


def rms(ours, truth):
    """Root of the mean square, over the rows, of their relative errors."""
    return float(((ours - truth).norm(dim=1) / truth.norm(dim=1)).square().mean().sqrt())


def relative(ours, theirs):
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())


@pytest.fixture
def no_float32_inside(monkeypatch):
    """Norms and softmaxes that drop to float32 stay in float64, so that float64 gradients are exact."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=None, dtype=None, **_: softmax(x, dim=dim))

    def patch(model):
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                gemma = "Gemma" in type(module).__name__
                eps = getattr(module, "variance_epsilon", None) or module.eps
                module.forward = partial(_rms_norm, module, eps, 1.0 if gemma else 0.0)
        return model

    return patch


def _rms_norm(module, eps, plus, x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (module.weight + plus)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_matches_one_at_a_time_in_float64(name, no_float32_inside):
    model = no_float32_inside(adapted(*ARCHITECTURES[name], dtype=torch.float64))
    forward = forward_of(model)
    assert (forward.path, forward.reason) == ("packed", None)
    examples = some_examples()
    expected, losses = one_at_a_time(model, examples)
    found, found_losses = dense(forward, examples)
    assert relative(found, expected) < 1e-12
    assert (found_losses - losses).abs().max() < 1e-12 * losses.abs().max()
    assert not any(p.grad is not None for p in model.parameters())


WIDE = dict(hidden_size=192, intermediate_size=384, num_hidden_layers=2, num_attention_heads=6, vocab_size=4096,
            num_key_value_heads=2, max_position_embeddings=128)  # fmt: skip


# Where sums have 32 terms, rounding W + scale B A once is seen; from some hundred terms on it is not.
@pytest.mark.parametrize(
    ("architecture", "factor"),
    [(ARCHITECTURES[name], 1.5) for name in ("llama", "gpt2", "gemma2", "mistral_window")]
    + [(("Llama", WIDE, ATTENTION), 1.0)],
    ids=["llama", "gpt2", "gemma2", "mistral_window", "wide"],
)
def test_float32_is_no_further_from_the_truth_than_autograd(architecture, factor, no_float32_inside):
    truth_model = no_float32_inside(adapted(*architecture, dtype=torch.float64))
    model = adapted(*architecture)
    model.load_state_dict(truth_model.float().state_dict())
    examples = some_examples()
    truth, _ = one_at_a_time(truth_model.double(), examples)
    theirs, _ = one_at_a_time(model, examples)
    ours, _ = dense(forward_of(model), examples)
    assert relative(ours, theirs) < 1e-4
    assert rms(ours, truth) <= factor * rms(theirs, truth)


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_other_models_go_one_by_one_and_say_so_once(name):
    model = adapted(*ONE_BY_ONE[name])
    with pytest.warns(FastselWarning, match="one row at a time") as caught:
        forward = forward_of(model)
    assert len(caught) == 1 and forward.path == "one by one"
    examples = some_examples()
    expected, _ = one_at_a_time(model, examples)
    found, _ = dense(forward, examples)
    assert relative(found, expected) < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        dict(r=1, lora_alpha=1),
        dict(r=8, lora_alpha=16, use_rslora=True),
        dict(rank_pattern={"q_proj": 2, "layers.1.self_attn.v_proj": 6}, alpha_pattern={"v_proj": 11}),
        dict(layers_to_transform=[1, 2]),
        dict(target_modules=r".*layers\.2\.mlp\.(up|down)_proj"),
        dict(init_lora_weights="gaussian"),
        dict(exclude_modules=["o_proj"]),
    ],
    ids=lambda options: "-".join(options),
)  # fmt: skip
def test_any_plain_configuration(options, no_float32_inside):
    options = dict(target_modules=ATTENTION) | options
    model = no_float32_inside(adapted("Llama", GROUPED, options.pop("target_modules"), dtype=torch.float64, **options))
    examples = some_examples()
    expected, _ = one_at_a_time(model, examples)
    assert relative(dense(forward_of(model), examples)[0], expected) < 1e-12


def test_layers_that_share_matrices_add_up(no_float32_inside):
    model = no_float32_inside(adapted("Llama", GROUPED, ["q_proj", "v_proj"], dtype=torch.float64))
    layers = model.get_base_model().model.layers
    first, other = layers[0].self_attn.q_proj, layers[2].self_attn.q_proj
    other.lora_A["default"].weight, other.lora_B["default"].weight = (
        first.lora_A["default"].weight, first.lora_B["default"].weight)  # fmt: skip
    other.scaling["default"] = 0.5
    forward = forward_of(model)
    assert len(forward.modules) == 5
    examples = some_examples()
    expected, _ = one_at_a_time(model, examples)
    assert relative(dense(forward, examples)[0], expected) < 1e-12
    other.lora_B["default"].weight = layers[1].self_attn.q_proj.lora_B["default"].weight
    with pytest.raises(InputError, match="shares only one of its LoRA matrices"):
        forward_of(model)


def test_float32_runs_fused_and_fillers_are_not_handed_over():
    """Layers that share matrices report twice; the sequences fill no multiple of rows."""
    model = adapted("Llama", GROUPED, ["q_proj", "v_proj", "down_proj"])
    first, other = (model.get_base_model().model.layers[i].self_attn.q_proj for i in (0, 2))
    other.lora_A["default"].weight, other.lora_B["default"].weight = (
        first.lora_A["default"].weight, first.lora_B["default"].weight)  # fmt: skip
    forward, examples, batches = forward_of(model), some_examples(), []
    assert {"swiglu", "frozen_linear"} <= set(forward.implementations)
    forward.body.register_forward_pre_hook(
        lambda module, args, named: batches.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    expected, _ = one_at_a_time(model, examples)
    batches.clear()
    found, _ = dense(forward, examples)
    n_tokens = sum(max(sequence.labelled) for example in examples for sequence in example)
    assert batches == [-(-n_tokens // ROWS_MULTIPLE) * ROWS_MULTIPLE] and n_tokens % ROWS_MULTIPLE
    assert relative(found, expected) < 1e-4


def test_law_the_company_of_an_example_changes_nothing(no_float32_inside):
    model = no_float32_inside(adapted(*ARCHITECTURES["qwen3"], dtype=torch.float64))
    forward = forward_of(model)
    examples = some_examples()
    together, losses = dense(forward, examples)
    order = [4, 0, 6, 2]
    some, some_losses = dense(forward, [examples[i] for i in order])
    assert relative(some, together[order]) < 1e-13
    torch.testing.assert_close(some_losses, losses[order], rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_law_checkpointing_changes_no_bit_and_keeps_less(name):
    forward = forward_of(adapted(*ARCHITECTURES[name]))
    examples = some_examples()
    kept, sizes = {}, {}
    for checkpointing in (False, True):
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(partial(lora_forward._count, found), lambda t: t):
            kept[checkpointing] = dense(forward, examples, checkpointing=checkpointing)
        sizes[checkpointing] = sum(found.values())
    assert torch.equal(kept[False][0], kept[True][0]) and torch.equal(kept[False][1], kept[True][1])
    assert sizes[True] < sizes[False] / 2


def test_memory_decides_about_checkpointing(monkeypatch):
    forward = forward_of(adapted(*ARCHITECTURES["llama"]))
    asked = []
    monkeypatch.setattr(
        lora_forward, "layers_computed_twice", lambda *_, **__: asked.append(1) or warnings.catch_warnings()
    )
    dense(forward, some_examples())
    assert not asked
    monkeypatch.setattr(lora_forward, "ACTIVATION_BYTES", 100 * forward.bytes_per_token)
    dense(forward, some_examples())
    assert asked == [1]


def test_only_layers_that_do_not_fit_are_computed_twice(monkeypatch):
    model = adapted(*ARCHITECTURES["llama"])
    forward, examples = forward_of(model), some_examples()
    expected = dense(forward, examples)[0]
    layers = model.get_base_model().model.layers
    counts = [0] * len(layers)
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: counts.__setitem__(number, counts[number] + 1))
    n_tokens = sum(max(sequence.labelled) for example in examples for sequence in example)
    monkeypatch.setattr(lora_forward, "ACTIVATION_BYTES", 0.5 * n_tokens * forward.bytes_per_token)
    assert torch.equal(dense(forward, examples)[0], expected)
    assert counts == [2, 2, 1]


def test_nothing_is_computed_below_the_lowest_lora_layer():
    """Layers below it keep nothing for a backward, and its own input gets no gradient."""
    model = adapted("Llama", GROUPED, ATTENTION, layers_to_transform=[2])
    forward = forward_of(model)
    low, seen = model.get_base_model().model.layers[1], []
    handle = low.register_forward_hook(lambda module, inputs, out: seen.append(out))
    dense(forward, some_examples())
    handle.remove()
    assert len(seen) == 1 and not seen[0].requires_grad


def test_edges_a_row_that_is_not_finite_leaves_the_others_alone():
    model = adapted(*ARCHITECTURES["llama"])
    forward = forward_of(model)
    examples = some_examples()
    expected, losses = dense(forward, examples)
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight[0] = float("inf")
    examples[2] = [LabelledSequence([0, *examples[2][0].ids[1:]], examples[2][0].labelled)]
    found, found_losses = dense(forward, examples)
    others = [0, 1, 3, 4, 5, 6]
    assert torch.isfinite(found[others]).all() and relative(found[others], expected[others]) < 1e-5
    assert found_losses[2].isnan() and torch.isfinite(found_losses[others]).all()
    assert not torch.isfinite(found[2]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_edges_sixteen_bits(dtype):
    """Close to float32's gradients of the same weights: 16 bits carry the activations, not a wrong formula."""
    model = adapted(*ARCHITECTURES["llama"], dtype=dtype)
    examples = some_examples()
    found, losses = dense(forward_of(model), examples)
    expected, expected_losses = one_at_a_time(model.float(), examples)
    cosine = torch.nn.functional.cosine_similarity(found, expected)
    assert cosine.min() > (0.999 if dtype == torch.float16 else 0.98)
    torch.testing.assert_close(losses, expected_losses, rtol=0.02, atol=0)


def test_edges_an_adapter_in_float32_on_a_base_of_16_bits():
    model = adapted(*ARCHITECTURES["llama"], dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    examples = some_examples()
    found, _ = dense(forward_of(model), examples)
    expected, _ = one_at_a_time(model, examples)
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.98


def test_flags_and_layers_are_left_as_they_were():
    model = adapted(*ARCHITECTURES["gpt2"])
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    dense(forward_of(model), some_examples())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.config._attn_implementation == "sdpa" and not model.training


def test_large_models_form_merged_weights_when_needed(monkeypatch):
    from fastsel.models import lora_modules

    model = adapted(*ARCHITECTURES["llama"])
    examples = some_examples()
    kept, _ = dense(forward_of(model), examples)
    monkeypatch.setattr(lora_modules, "MOST_MERGED_BYTES", 0)
    forward = forward_of(model)
    assert not forward.lora._merged
    assert torch.equal(dense(forward, examples)[0], kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(use_dora=True), "is a Dora layer"),
        (dict(lora_bias=True, target_modules=["q_proj"]), "lora_bias=True"),
        (dict(bias="lora_only"), "bias='lora_only'"),
        (dict(modules_to_save=["embed_tokens"]), "modules_to_save"),
        (dict(target_modules=["embed_tokens"]), "Embedding: only LoRA on linear layers"),
        (dict(trainable_token_indices=[3]), "trainable_token_indices|TrainableTokens"),
    ],
    ids=["dora", "lora_bias", "bias", "modules_to_save", "embedding", "tokens"],
)  # fmt: skip
def test_refuses_what_is_not_plain_lora(options, message):
    sizes = SMALL | dict(attention_bias=True)
    options = dict(target_modules=["q_proj", "v_proj"]) | options
    model = adapted("Llama", sizes, options.pop("target_modules"), **options)
    with pytest.raises(InputError, match=message):
        forward_of(model)


def test_refuses_heads_merged_and_missing_adapters():
    model = adapted("Llama", GROUPED, ["q_proj", "lm_head"])
    with pytest.raises(InputError, match="lm_head"):
        forward_of(model)
    model = adapted("Llama", GROUPED, ["q_proj"])
    model.merge_adapter()
    with pytest.raises(InputError, match="unmerge_adapter"):
        forward_of(model)
    with pytest.raises(InputError, match="no LoRA layer"):
        LoraForward(load(tiny_model("Llama", GROUPED)))
    model.unmerge_adapter()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(InputError, match="2 adapters at once"):
        forward_of(model)


def test_refuses_layers_that_do_something_unknown():
    model = adapted("Llama", GROUPED, ["q_proj"])
    model.get_base_model().model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, i, out: out)
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    layer.lora_A["default"].register_forward_hook(lambda module, inputs, out: out * 2)
    with pytest.raises(InputError, match="do something unknown"):
        forward_of(model)


def test_refuses_examples_without_labels_and_too_long_ones():
    forward = forward_of(adapted(*ARCHITECTURES["llama"]))
    refused = [
        ([LabelledSequence([1, 2, 3], [])], "example 0 has no labelled token"),
        ([LabelledSequence([1, 2, 3], [0, 1])], "must have a token before them"),
        ([LabelledSequence([1, 2, 3], [3])], "within the sequence"),
        ([LabelledSequence([1] * 129, [5])], "has 129 tokens, .* takes at most 128"),
    ]
    for example, message in refused:
        with pytest.raises(ValueError, match=message):
            forward.run([example], lambda _: None)


def test_a_gpu_may_keep_an_eighth_of_its_memory(monkeypatch):
    sizes = {0: 80 << 30, 1: 2 << 30}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=sizes[device.index])
    )
    kept = [lora_forward.activation_bytes(torch.device(name)) for name in ("cpu", "cuda:0", "cuda:1")]
    assert kept == [lora_forward.ACTIVATION_BYTES, 10 << 30, lora_forward.ACTIVATION_BYTES]
