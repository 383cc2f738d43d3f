"""A run that is stopped by a signal goes on where it was, and ends in the bytes of a run that was never stopped."""

import json
import re
import signal
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fastsel.cli import main  # noqa: E402
from fastsel.store import FeatureStore  # noqa: E402

SAME_BYTES = ("selected.jsonl", "selection.parquet", "indices.npy", "scores.npy", "config.yaml")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "boats", "sail", "home"]
# Shards of 400 tokens instead of 65,536, so that a small pool has many; after the second the process signals itself.
STOP_AFTER_TWO_SHARDS = """
import os, sys
import fastsel.features.batches as batches
from fastsel.cli import entry_point
from fastsel.store import FeatureStore
batches.SHARD_TOKENS = 400
write, written, number = FeatureStore.write, [], int(sys.argv.pop())
def write_and_stop(self, *arguments):
    write(self, *arguments)
    written.append(arguments)
    if len(written) == 2:
        os.kill(os.getpid(), number)
FeatureStore.write = write_and_stop
sys.argv[0] = "fastsel"
entry_point()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama of two layers and 16 dimensions with a tokenizer of whole words, saved as safetensors."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    words = ["<unk>", "<s>", "</s>", *WORDS, "Response", "Instruction", "Input", "#", ":", ".", "Below", "is"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def pool(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)

    def text(n):
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator))

    rows = [{"instruction": text(5 + i % 7), "input": "", "output": text(3 + i % 11)} for i in range(60)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def words(model, out, *more):
    return ["select", "ifd", "--pool", "pool.jsonl", "--model", str(model), "--budget", "20%", "-o", out, *more]


def stop(model, out, number):
    return subprocess.run(
        [sys.executable, "-c", STOP_AFTER_TWO_SHARDS, *words(model, out), str(int(number))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("number", "code", "how"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "terminated")]
)
def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(number, code, how, model, pool, capsys, monkeypatch):
    monkeypatch.setattr("fastsel.features.batches.SHARD_TOKENS", 400)
    assert main(words(model, "whole")) == 0
    shards = sorted(path.name for path in (pool / "whole/features").glob("*.npy"))
    assert len(shards) > 4

    done = stop(model, "out", number)
    assert done.returncode == code, done.stderr
    assert how in done.stderr and "Traceback" not in done.stderr
    assert "To go on: fastsel select ifd --pool pool.jsonl" in done.stderr
    kept = sorted(path.name for path in (pool / "out/features").glob("*.npy"))
    assert kept == shards[:2]
    assert not (pool / "out/manifest.json").exists()
    times = [(pool / "out/features" / name).stat().st_mtime_ns for name in kept]

    capsys.readouterr()
    assert main(words(model, "out")) == 0
    assert "going on with the unfinished run" in capsys.readouterr().err
    assert [(pool / "out/features" / name).stat().st_mtime_ns for name in kept] == times, "scored again"
    for name in SAME_BYTES:
        whole, resumed = ((pool / folder / name).read_bytes() for folder in ("whole", "out"))
        assert resumed.replace(b"output: out", b"output: whole") == whole, name


def test_another_request_does_not_go_on_with_a_stopped_run(model, pool, capsys, monkeypatch):
    write = FeatureStore.write

    def write_and_stop(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FeatureStore, "write", write_and_stop)
        assert main(words(model, "out")) == 130
    capsys.readouterr()
    assert main(words(model, "out", "--template", "none")) == 2
    err = capsys.readouterr().err
    assert "an unfinished run of another request" in err and 'template: "alpaca" there, "none" now' in err
    assert main(words(model, "out", "--template", "none", "--overwrite")) == 0


def test_choosing_again_needs_no_model(model, pool, capsys):
    assert main(words(model, "out")) == 0
    err = capsys.readouterr().err
    assert re.findall(r"kernel: (\w+) runs", err).count("linear_token_stats") == 1, "said once, not at every call"
    assert main(["select", "--from", "out", "--budget", "3", "-o", "three", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["kept"] == 3 and "no model runs" in captured.err
    assert not (pool / "three/features").exists()


def test_dry_run_counts_the_tokens_and_keeps_nothing(model, pool, capsys):
    assert main([*words(model, "out"), "--dry-run", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert expected["trial_rows"] == 60 and expected["tokens"] > 60 * 10
    assert expected["device"] in ("cpu", "cuda:0") and expected["model"] == str(model)
    assert sorted(path.name for path in pool.iterdir()) == ["pool.jsonl"]
    assert main(words(model, "out", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"]["pool"]["total"] == expected["tokens"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "cuda:9"], "cuda"),
        (["--dtype", "float7"], "dtype='float7' is not known"),
        (["--max-length", "100000"], "max_length=100000"),
        (["--template", "nosuch"], "nosuch"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_what_the_model_cannot_do_is_one_message(more, message, model, pool, capsys):
    assert main(words(model, "out", "--offline", *more)) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_an_implementation_that_cannot_run_is_an_error_and_says_why(model, pool, capsys):
    if torch.cuda.is_available():
        pytest.skip("Triton runs here")
    assert main(words(model, "out", "--implementation", "triton")) == 2
    err = capsys.readouterr().err
    assert "triton:" in err and "`fastsel doctor` says what runs" in err
