"""`fastsel warmup`: the table of its flags, and one run from the command line."""

import inspect
import json

import pytest
import torch

from fastsel.cli import main
from fastsel.commands.catalogue import WARMUP
from fastsel.commands.options import OPTIONS
from fastsel.features.warmup import warmup

transformers = pytest.importorskip("transformers")


def test_defaults_are_those_of_the_function():
    keywords = {
        parameter.name: parameter.default
        for parameter in inspect.signature(warmup).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    keywords["warmup_fraction"] = keywords.pop("fraction")
    for name in ("output", "seed", "progress"):
        del keywords[name]
    assert keywords == WARMUP
    for option, default in WARMUP.items():
        read = OPTIONS[option].read
        assert default is None or read(default) == (list(default) if isinstance(default, tuple) else default)


@pytest.fixture
def model(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                      num_attention_heads=2, max_position_embeddings=64)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "[UNK]": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="<eos>")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_one_run(model, tmp_path, capsys):
    pool = tmp_path / "pool.jsonl"
    pool.write_text('{"q": "a", "r": "b a"}\n' * 8)
    words = ["warmup", str(pool), "--columns", "prompt=q", "response=r", "--model", model, "-o", str(tmp_path / "run")]
    words += ["--warmup-fraction", "0.5", "--epochs", "2", "--lora-r", "2", "--target-modules", "all-linear", "-q"]
    words += ["--rows-a-step", "2", "--learning-rate", "0.01", "--offline"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "2 checkpoints in" in text and f"use them: --checkpoints {tmp_path / 'run'}" in text
    assert "checkpoint-2: step 2, mean learning rate 0.005 since" in text
    assert main([*words, "--json"]) == 0  # it is there already
    found = json.loads(capsys.readouterr().out)
    assert [(c["step"], c["learning_rate"]) for c in found["checkpoints"]] == [(2, 0.005), (4, pytest.approx(0.005))]
    config = json.loads((tmp_path / "run" / "checkpoint-4" / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["base_model_name_or_path"] == model
    assert main([*words, "--epochs", "3"]) == 2
    assert "epochs: 2 there, 3 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which pool? fastsel warmup POOL"),
        (["pool.jsonl"], "where to write? -o DIR"),
        (["pool.jsonl", "-o", "x", "--epochs", "0"], "--epochs wants a whole number, 1 or more"),
        (["pool.jsonl", "-o", "x", "--lora-rank", "3"], "did you mean --lora-r"),
        (["nowhere.jsonl", "-o", "x"], "nowhere.jsonl"),
    ],
)
def test_refuses(words, message, capsys):
    assert main(["warmup", *words]) == 2
    assert message in capsys.readouterr().err


def test_help_says_the_defaults(capsys):
    assert main(["warmup", "--help"]) == 0
    text = capsys.readouterr().out
    assert "(default: q_proj k_proj v_proj o_proj)" in text and "--warmup-fraction" in text
