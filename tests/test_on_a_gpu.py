"""Selectors, features and commands on a GPU give what they give on a CPU, up to what float32 rounds."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from fastsel import selectors  # noqa: E402
from fastsel.cli import main  # noqa: E402
from fastsel.io import bundled_pool_path, open_pool  # noqa: E402
from fastsel.io.templates import ALPACA  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
N, D, K = 5000, 64, 60


# ------------------------------------------------------------------------------------ selectors


def clustered(n=N, d=D, seed=0):
    """Rows around 50 centres: no two alike, similar ones among them."""
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((50, d))
    return (centres[draw.integers(50, size=n)] + 0.7 * draw.standard_normal((n, d))).astype(np.float32)


def labels_of_rows(n=N, n_labels=300):
    draw = np.random.default_rng(1)
    return (draw.random((n, n_labels)) < 0.02) * draw.uniform(0.1, 5.0, (n, n_labels))


SELECTORS = {
    "facility_location": lambda x: selectors.facility_location(x, K),
    "facility_location-euclidean": lambda x: selectors.facility_location(x, K, similarity="exp_distance"),
    "facility_location-lazy": lambda x: selectors.facility_location(x, K, optimizer="lazy"),
    "facility_location-neighbours": lambda x: selectors.facility_location(x, K, neighbours=10),
    "k_center": lambda x: selectors.k_center(x, 5 * K),
    "k_center-cosine": lambda x: selectors.k_center(x, 5 * K, metric="cosine"),
    "novelselect": lambda x: selectors.novelselect(x, K),
    "novelselect-paper": lambda x: selectors.novelselect(x, K, rule="paper"),
    "repr_filter": lambda x: selectors.repr_filter(x, K, threshold=0.7),
    "max_sum_dispersion": lambda x: selectors.max_sum_dispersion(x, K),
    "vendi_sample": lambda x: selectors.vendi_sample(x, K),
    "graph_walk": lambda x: selectors.graph_walk(x, K, x[:20]),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_choose_the_same_rows(name, dtype):
    """Contenders are decided in float64 on both: the lists are equal, not only similar."""
    x = torch.from_numpy(clustered()).to(getattr(torch, dtype))
    expected, expected_gains = SELECTORS[name](x)
    found, gains = SELECTORS[name](x.to(DEVICE))
    np.testing.assert_array_equal(found, expected)
    # 1e-6: gains of repr_filter and of sparse problems come from float32 products.
    np.testing.assert_allclose(gains, expected_gains, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gain", ["first_order", "exact"])
def test_mig_chooses_the_same_rows(gain):
    labels, embeddings = torch.from_numpy(labels_of_rows()), torch.from_numpy(clustered(300, 32, seed=2))
    expected, expected_gains = selectors.mig(labels, K, embeddings=embeddings, threshold=0.6, gain=gain)
    found, gains = selectors.mig(labels.to(DEVICE), K, embeddings=embeddings.to(DEVICE), threshold=0.6, gain=gain)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(gains, expected_gains, rtol=1e-9)


# ------------------------------------------------------------------------------------ models


@pytest.fixture(scope="module")
def pool():
    return open_pool(bundled_pool_path(), limit=24)


def small_model(tokenizer, *, head_size=32, with_adapter=False):
    """A Llama with random weights, in float32 on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=4 * head_size, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=800,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if with_adapter:
        import peft

        lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft asks for what transformers deprecates
            model = peft.get_peft_model(model, lora)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def losses_of(pool, tokenizer, device, dtype=torch.float32, **model):
    from fastsel.features.token_stats import answer_losses
    from fastsel.models.loading import load_model
    from fastsel.models.packed import PackedForward

    loaded = load_model((small_model(tokenizer, **model).to(device, dtype), tokenizer))
    forward = PackedForward(loaded)
    assert forward.path == "packed", forward.reason
    if device == "cuda":
        ran = {kernel: code.split("-")[0] for kernel, code in forward.implementations.items()}
        assert ran == {"tree_attention": "triton", "linear_token_stats": "triton"}
    return answer_losses(pool, loaded, template=ALPACA, max_length=700, progress="none")


@pytest.mark.parametrize("head_size", [32, 64, 80])
def test_losses(pool, tokenizer, head_size):
    from fastsel.io.examples import TRUNCATED

    here, there = (losses_of(pool, tokenizer, device, head_size=head_size) for device in ("cpu", DEVICE))
    np.testing.assert_array_equal(here.status, there.status)
    assert (here.status <= TRUNCATED).sum() > 15
    for of_pass in ("conditioned", "direct"):
        # Three layers of float32 products in another order: about 1e-6 of a loss.
        np.testing.assert_allclose(there.mean(of_pass), here.mean(of_pass), rtol=2e-5)


def test_losses_in_16_bits(pool, tokenizer):
    here = losses_of(pool, tokenizer, "cpu")
    for dtype in (torch.bfloat16, torch.float16):
        there = losses_of(pool, tokenizer, DEVICE, dtype)
        np.testing.assert_array_equal(here.status, there.status)
        # Logits near 0 of a model with random weights: bfloat16's 8 bits leave a hundredth of a loss.
        np.testing.assert_allclose(there.mean("conditioned"), here.mean("conditioned"), rtol=2e-2)


def test_hidden_states_of_a_causal_model(pool, tokenizer):
    from fastsel.features.embeddings import embed_pool

    found = [
        embed_pool(pool, (small_model(tokenizer).to(device), tokenizer), progress="none") for device in ("cpu", DEVICE)
    ]
    # Unit rows, of float32 sums in another order.
    np.testing.assert_allclose(found[1].matrix, found[0].matrix, atol=5e-6)


def gradients_of(pool, tokenizer, device, dtype=torch.float32, *, step):
    from fastsel.features.gradient_rows import AdamMoments
    from fastsel.features.gradients import lora_gradients
    from fastsel.io.templates import load_template
    from fastsel.kernels.lora_gradient_sketch import SketchSpec
    from fastsel.models.loading import load_model
    from fastsel.models.lora_forward import LoraForward

    model = small_model(tokenizer, with_adapter=True).to(device, dtype)
    loaded = replace(load_model((model, tokenizer)), model=model)
    p = LoraForward(loaded).n_parameters
    draw = torch.Generator().manual_seed(2)
    targets = torch.randn(5, p, generator=draw)
    moments = AdamMoments(1e-3 * torch.randn(p, generator=draw), 1e-6 * torch.rand(p, generator=draw), 7)
    return lora_gradients(
        pool, loaded, template=load_template("tulu", tokenizer), max_length=300, progress="none", step=step,
        moments=moments if step == "adam" else None, targets=targets, sketch=SketchSpec(512, seed=5),
    )  # fmt: skip


def sketches(gradients):
    return np.concatenate([block for _, block in gradients.sketches()]).astype(np.float64)


@pytest.mark.parametrize("step", ["adam", "sgd"])
def test_lora_gradients(pool, tokenizer, step):
    here, there = (gradients_of(pool, tokenizer, device, step=step) for device in ("cpu", DEVICE))
    np.testing.assert_array_equal(here.status, there.status)
    np.testing.assert_allclose(there.loss, here.loss, rtol=2e-5)
    np.testing.assert_allclose(there.sqnorm, here.sqnorm, rtol=1e-3)
    usable = np.isfinite(here.sqnorm)
    lengths = np.sqrt(here.sqnorm[usable])[:, None]
    # A dot with a target of length sqrt(p), a coordinate of a sketch: relative to the gradient's own length.
    scale = lengths * np.sqrt(here.n_parameters)
    assert (np.abs(there.dots[usable] - here.dots[usable]) / scale).max() < 1e-4
    assert (np.abs(sketches(there) - sketches(here)) / lengths).max() < 2e-3  # kept in float16


def test_lora_gradients_in_16_bits_are_finite_and_alike(pool, tokenizer):
    here = gradients_of(pool, tokenizer, "cpu", step="sgd")
    there = gradients_of(pool, tokenizer, DEVICE, torch.bfloat16, step="sgd")
    usable = np.isfinite(here.sqnorm)
    assert np.isfinite(there.sqnorm[usable]).all() and np.isfinite(there.dots[usable]).all()
    assert np.corrcoef(there.sqnorm[usable], here.sqnorm[usable])[0, 1] > 0.95


# ------------------------------------------------------------------------------------ commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A pool, a target and a model's folder."""
    folder = tmp_path_factory.mktemp("commands")
    small_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = np.random.default_rng(0)
    for name, n in (("pool", 24), ("target", 5)):
        rows = [
            {key: " ".join(draw.choice(["red", "blue", "one", "two", "cat"], 6)) for key in ("instruction", "output")}
            for _ in range(n)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(folder, *words, where=DEVICE):
    given = ["--device", where, "--template", "none", "--max-length", "96", "--progress", "none"]
    code = main([word.replace("FOLDER", str(folder)) for word in [*words, *given]])
    assert code == 0


def test_ifd_on_the_command_line(folder):
    command(folder, "select", "ifd", "--pool", "FOLDER/pool.jsonl", "--model", "FOLDER/model", "--budget", "5",
            "-o", "FOLDER/ifd")  # fmt: skip
    assert list((folder / "ifd").iterdir())


def test_less_on_the_command_line(folder):
    command(folder, "warmup", "FOLDER/pool.jsonl", "-o", "FOLDER/warm", "--model", "FOLDER/model", "--epochs", "2",
            "--lora-r", "4", "--rows-a-step", "4")  # fmt: skip
    command(folder, "select", "less", "--pool", "FOLDER/pool.jsonl", "--target", "FOLDER/target.jsonl", "--leaks",
            "none", "--checkpoints", "FOLDER/warm", "--budget", "5", "-o", "FOLDER/less")  # fmt: skip
    assert list((folder / "less").iterdir())
