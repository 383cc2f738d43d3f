"""Methods on gradients on the command line: checkpoints, choosing again, wrong inputs and what is said then."""

import json
import re
import shutil
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("peft")

from fastsel.cli import main  # noqa: E402
from fastsel.features.gradient_rows import GradientWorker  # noqa: E402

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "boats"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a pool of 24 rows, two targets, a tiny model, and a LoRA run of it made on the command line."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("run")
    draw = np.random.default_rng(0)

    def rows(n, **fields):
        def text():
            return " ".join(draw.choice(WORDS, draw.integers(3, 9)))

        return [{"instruction": text(), "output": text(), "source": f"s{i % 2}", **fields} for i in range(n)]

    for name, content in {
        "pool": [*rows(22), {"instruction": "the " * 40, "output": "fox"}, {"instruction": "dog", "output": ""}],
        "math": rows(4, task="m"), "code": rows(3, task="c"), "masked": [{"instruction": "the " * 40, "output": "x"}],
    }.items():  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<eos>", "[UNK]", *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="<eos>")
    for name, size in (("model", 16), ("other", 24)):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=20, hidden_size=size, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    assert main([
        "warmup", str(folder / "pool.jsonl"), "-o", str(folder / "warm"), "--model", str(folder / "model"), "--epochs",
        "2", "--lora-r", "2", "--rows-a-step", "4", "--learning-rate", "1e-2", "--warmup-fraction", "0.5",
        "--template", "none", "--max-length", "24", "--progress", "none",
    ]) == 0  # fmt: skip
    return folder


@pytest.fixture
def select(run, tmp_path, monkeypatch, capsys):
    """select(method, out, *words) -> (code, stderr)."""
    monkeypatch.chdir(run)

    def call(method, out, *words, target=("math.jsonl",), checkpoints="warm"):
        given = ["--pool", "pool.jsonl", "--target", *target] if method else []
        if method and checkpoints:
            given += ["--checkpoints", str(checkpoints)]
        if method and method != "bm25":
            given += ["--template", "none", "--max-length", "24"]
        budget = [] if "--budget" in words else ["--budget", "5"]
        capsys.readouterr()
        code = main(
            ["select", *([method] if method else []), *given, "--leaks", "none", *budget, *words, "--progress", "none",
             "-o", str(tmp_path / out)]
        )  # fmt: skip
        return code, capsys.readouterr().err

    return call


def column(folder, name):
    return pq.read_table(folder / "selection.parquet")[name].to_pylist()


def test_the_base_is_the_one_the_checkpoints_name(select, tmp_path):
    code, err = select("less", "out")
    assert code == 0 and "model: what the checkpoints were trained on" in err
    code, _ = select("less", "named", "--model", "model")
    assert code == 0
    assert column(tmp_path / "out", "score") == column(tmp_path / "named", "score")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["provenance"]["base"]["name"].endswith("model")
    assert "epochs" not in manifest["config"] and "lora_r" not in manifest["config"]
    assert manifest["provenance"]["targets"][0]["inputs"][0]["sha256"]


def test_a_sketch_serves_another_target_and_no_pool_row_goes_through_the_model(select, tmp_path, monkeypatch):
    sketch = ("--mode", "sketch", "--sketch-size", "64")
    assert select("less", "first", *sketch)[0] == 0
    assert select("less", "fresh", *sketch, target=("code.jsonl",))[0] == 0
    monkeypatch.setattr(GradientWorker, "__call__", lambda *_: pytest.fail("a pool row went through the model again"))
    first = str(tmp_path / "first")
    code, err = select(None, "again", "--from", first, "--target", "code.jsonl")
    assert code == 0 and "only rows of the target go through the model" in err
    assert (tmp_path / "again" / "scores.npy").read_bytes() == (tmp_path / "fresh" / "scores.npy").read_bytes()
    code, err = select(None, "both", "--from", first, "--target", "math.jsonl", "code.jsonl")
    assert code == 0
    code, err = select(None, "seeded", "--from", first, "--seed", "3")
    assert code == 2 and "--seed was 0" in err


def test_products_serve_their_own_target_only(select, tmp_path):
    assert select("less", "first")[0] == 0
    code, err = select(None, "other", "--from", str(tmp_path / "first"), "--target", "code.jsonl")
    assert code == 2 and "a run with --mode sketch serves any target" in err
    code, _ = select(None, "fewer", "--from", str(tmp_path / "first"), "--budget", "2")
    assert code == 0 and column(tmp_path / "fewer", "score") == column(tmp_path / "first", "score")


def test_other_checkpoints_in_the_same_place_are_another_request(select, run, tmp_path):
    copy = shutil.copytree(run / "warm", tmp_path / "warm")
    assert select("less", "out", checkpoints=copy)[0] == 0
    code, err = select("less", "out", checkpoints=run / "warm")  # the same run under another name
    assert code == 0 and "this request is finished already" in err
    shutil.rmtree(copy / "checkpoint-3")
    (only,) = copy.glob("checkpoint-*")
    code, err = select("less", "out", checkpoints=copy)
    assert code == 2 and "checkpoints:" in err and only.is_dir()


@pytest.mark.parametrize(
    ("words", "options", "said"),
    [
        (("--model", "other"), {}, "was trained on .*model.*size mismatch.*name that model"),
        ((), {"checkpoints": "model"}, "model is a whole model, not an adapter"),
        ((), {"checkpoints": "nowhere"}, "checkpoint nowhere: there is no such folder"),
        ((), {"target": ("masked.jsonl",)}, "target masked has no row that can be used"),
        ((), {"target": ("nothing.jsonl",)}, "nothing.jsonl: no such file"),
        (("--subtask-column", "part"), {}, "no row has a value in the column part; the first has: instruction"),
        (("--lora-r", "8"), {}, "--lora-r .* does nothing with --checkpoints"),
    ],
)
def test_wrong_inputs_are_said_and_leave_the_folder_free(select, words, options, said):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code, err = select("less", "out", *words, **options)
    assert code == 2 and re.search(said, err, re.DOTALL), err
    assert select("less", "out")[0] == 0


@pytest.mark.parametrize("method", ["less", "g2is", "cluster_ucb", "in2core"])
def test_every_method_names_its_target_checkpoints_and_rows_without_a_gradient(select, tmp_path, method):
    more = {"g2is": ("--sketch-size", "64"), "cluster_ucb": ("--sketch-size", "64", "--clusters", "2", "--draw-share",
            "0.9")}.get(method, ())  # fmt: skip
    code, err = select(method, "out", *more)
    assert code == 0, err
    status = column(tmp_path / "out", "status")
    assert status[22:] == ["skipped", "skipped"] and set(status[:22]) == {"ok"}
    assert column(tmp_path / "out", "score")[22:] == [None, None]
    assert "leaves no answer token" in column(tmp_path / "out", "reason")[22]
    provenance = json.loads((tmp_path / "out" / "manifest.json").read_text())["provenance"]
    assert provenance["targets"][0]["rows"] == 4 and provenance["template"]["id"]
    assert [c["step"] for c in provenance["checkpoints"]] == [3, 6]
    code, err = select(method, "more", *more, "--budget", "2000")
    assert code == 3, "more than the pool has is done, but short"


def test_union_says_how_many_each_target_chose(select, tmp_path):
    code, _ = select("less", "out", "--combine", "union", target=("math.jsonl", "code.jsonl"))
    assert code == 0
    notes = json.loads((tmp_path / "out" / "manifest.json").read_text())["notes"]
    kept = sum(column(tmp_path / "out", "selected"))
    assert f"union: 2 targets with a budget each chose {kept} rows together" in notes


def test_an_estimate_takes_the_trials_rows_of_given_gradients(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool.jsonl").write_text("".join(f'{{"instruction": "q{i}", "output": "a"}}\n' for i in range(130)))
    draw = np.random.default_rng(0)
    np.save("x.npy", draw.standard_normal((130, 8)))
    np.save("t.npy", draw.standard_normal((5, 8)))
    words = ["select", "g2is", "--pool", "pool.jsonl", "--target-gradients", "t.npy", "--dry-run", "--gradients"]
    assert main([*words, "x.npy"]) == 0
    assert "130 rows" in capsys.readouterr().out
    assert main([*words, "nothing.npy"]) == 2
    assert "gradients nothing.npy cannot be read" in capsys.readouterr().err
