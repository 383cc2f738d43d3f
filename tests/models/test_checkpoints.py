"""Checkpoints of LoRA runs: Adam's moments by name, learning rates by step, and what cannot be used."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastsel.errors import FastselWarning, InputError
from fastsel.models.adam_state import plain_name, read_adam_state
from fastsel.models.checkpoints import Checkpoint, mean_learning_rate, open_checkpoints
from fastsel.models.loading import load_model

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = dict(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             max_position_embeddings=64)  # fmt: skip


def tiny_pair():
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return model, transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


class Run:
    """A LoRA run of three steps, one checkpoint each, saved as transformers' Trainer does; its optimizer is kept."""

    def __init__(self, folder, **lora):
        model, tokenizer = tiny_pair()
        self.base = folder / "base"
        model.save_pretrained(self.base)
        tokenizer.save_pretrained(self.base)
        model.name_or_path = str(self.base)
        config = peft.LoraConfig(**({"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | lora))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks for what transformers deprecates
            self.model = peft.get_peft_model(model, config)
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        decayed = [p for name, p in named if "bias" not in name and "norm" not in name]
        rest = [p for name, p in named if "bias" in name or "norm" in name]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": rest}], lr=1e-2, betas=(0.8, 0.95), eps=1e-7
        )
        self.folder, self.moments, history = folder / "run", {}, []
        for step in (1, 2, 3):
            ids = torch.randint(0, 60, (2, 8), generator=torch.Generator().manual_seed(step))
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            history.append({"step": step, "learning_rate": 1e-3 * step, "loss": 1.0})
            path = self.folder / f"checkpoint-{step}"
            self.model.save_pretrained(path)
            torch.save(self.optimizer.state_dict(), path / "optimizer.pt")
            (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
            self.moments[step] = {
                name: tuple(self.optimizer.state[p][key].clone() for key in ("exp_avg", "exp_avg_sq"))
                for name, p in named
            }
        self.last = self.folder / "checkpoint-3"

    def by_name(self):
        """The last state as FSDP keeps it: whole, under names."""
        state = {
            name: {"exp_avg": m, "exp_avg_sq": v, "step": torch.tensor(3.0)} for name, (m, v) in self.moments[3].items()
        }
        return {"state": state, "param_groups": [{"params": self.names, "betas": (0.8, 0.95), "eps": 1e-7}]}


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def assert_same_moments(state, expected):
    assert list(state.moments) == list(expected)
    for name, pair in expected.items():
        assert all(
            torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(state.moments[name], pair, strict=True)
        )


def test_integer_keys_are_the_trained_parameters_in_order(run):
    for checkpoint in open_checkpoints(run.folder):
        state = checkpoint.adam_state(run.names)
        assert_same_moments(state, run.moments[checkpoint.step])
        assert (state.step, state.betas, state.eps) == (checkpoint.step, (0.8, 0.95), 1e-7)


def test_parameters_without_decay_are_numbered_after_those_with_it(tmp_path):
    run = Run(tmp_path, modules_to_save=["input_layernorm"])
    assert any("norm" in name for name in run.names[: len(run.names) // 2])  # between the others by their order
    state = read_adam_state(run.last, run.names)
    assert_same_moments(state, run.moments[3])


def test_names_that_the_file_writes_down_win_over_the_order(run):
    state = run.optimizer.state_dict()
    turned = {"state": {}, "param_groups": [{**state["param_groups"][0], "param_names": run.names[::-1]}]}
    n = len(run.names)
    turned["state"] = {i: state["state"][n - 1 - i] for i in range(n)}
    torch.save(turned, run.last / "optimizer.pt")
    assert_same_moments(open_checkpoints(run.last)[0].adam_state(run.names), run.moments[3])


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: name.replace(".default", ""),
        lambda name: "_fsdp_wrapped_module." + name.replace(".layers.", "._fsdp_wrapped_module.layers."),
        lambda name: "module._orig_mod." + name,
    ],
)
def test_a_full_fsdp_state_has_names(run, rename):
    state = run.by_name()
    state["state"] = {rename(name): value for name, value in reversed(state["state"].items())}
    (run.last / "optimizer.pt").unlink()
    torch.save(state, run.last / "optimizer.bin")
    read = open_checkpoints(run.last)[0].adam_state(run.names[2:])
    assert_same_moments(read, {name: run.moments[3][name] for name in run.names[2:]})
    assert (read.step, read.betas, read.eps) == (3, (0.8, 0.95), 1e-7)


def test_a_state_without_groups_has_torchs_constants(run):
    (run.last / "optimizer.pt").unlink()
    bare = {name: {"exp_avg": m, "exp_avg_sq": v} for name, (m, v) in run.moments[3].items()}
    torch.save({"state": bare}, run.last / "optimizer.bin")
    read = read_adam_state(run.last, run.names)
    assert (read.betas, read.eps, read.step) == ((0.9, 0.999), 1e-8, 0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_sharded_states_are_refused_with_the_command_that_merges_them_and_that_command_is_right(run):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    (run.last / "optimizer.pt").unlink()
    dcp.save({"optimizer": run.by_name()}, checkpoint_id=run.last / "optimizer_0", no_dist=True)
    with pytest.raises(InputError) as refused:
        open_checkpoints(run.last)[0].adam_state(run.names)
    command = str(refused.value).splitlines()[1].split()
    module = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
    assert command == [*module.split(), str(run.last / "optimizer_0"), str(run.last / "optimizer.bin")]
    dcp_to_torch_save(*command[-2:])
    read = open_checkpoints(run.last)[0].adam_state(run.names)
    assert_same_moments(read, run.moments[3])


def test_bfloat16_moments_come_as_float32(run):
    state = run.by_name()
    for entry in state["state"].values():
        entry |= {key: entry[key].bfloat16() for key in ("exp_avg", "exp_avg_sq")}
    (run.last / "optimizer.pt").unlink()
    torch.save(state, run.last / "optimizer.bin")
    expected = {name: tuple(x.bfloat16().float() for x in pair) for name, pair in run.moments[3].items()}
    assert_same_moments(read_adam_state(run.last, run.names), expected)


def _replace_first(run, **entry):
    state = run.optimizer.state_dict()
    state["state"][0] = entry
    torch.save(state, run.last / "optimizer.pt")


REFUSALS = {
    "none": (lambda run: (run.last / "optimizer.pt").unlink(), "neither optimizer.pt nor optimizer.bin.*warmup"),
    "one a process": (
        lambda run: (run.last / "optimizer.pt").rename(run.last / "optimizer_0_rank1.bin"),
        "one optimizer file for each process.*FULL_STATE_DICT",
    ),
    "empty": (lambda run: torch.save({"state": {}}, run.last / "optimizer.pt"), "no state of an optimizer"),
    "a list": (lambda run: torch.save([1], run.last / "optimizer.pt"), "holds a list"),
    "broken": (lambda run: (run.last / "optimizer.pt").write_bytes(b"PK no"), "cannot be read without running code"),
    "code": (
        lambda run: torch.save({"state": {0: Checkpoint}}, run.last / "optimizer.pt"),
        "cannot be read without running code",
    ),
    "8-bit": (
        lambda run: _replace_first(run, state1=torch.zeros(2), state2=torch.zeros(2)),
        r"\['state1', 'state2'\] for .*adamw_torch",
    ),
    "another shape": (
        lambda run: _replace_first(run, exp_avg=torch.zeros(3, 3), exp_avg_sq=torch.zeros(3, 3)),
        r"in shape \[3, 3\], the adapter in \[2, 16\]",
    ),
    "not finite": (
        lambda run: _replace_first(run, exp_avg=torch.full((2, 16), np.nan), exp_avg_sq=torch.zeros(2, 16)),
        "not finite numbers",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refuses_optimizer_files(run, what):
    spoil, words = REFUSALS[what]
    spoil(run)
    with pytest.raises(InputError, match=words):
        open_checkpoints(run.last)[0].adam_state(run.names)


def test_refuses_deepspeed(run):
    (run.last / "optimizer.pt").unlink()
    (run.last / "global_step3").mkdir()
    (run.last / "global_step3" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    with pytest.raises(InputError, match="DeepSpeed's optimizer state.*FSDP"):
        read_adam_state(run.last, run.names)


def test_refuses_names_that_do_not_fit(run):
    with pytest.raises(InputError, match=f"numbers {len(run.names)} parameters, the adapter has 1"):
        read_adam_state(run.last, run.names[:1])
    (run.last / "optimizer.pt").unlink()
    torch.save(run.by_name(), run.last / "optimizer.bin")
    with pytest.raises(InputError, match="no moments for another.weight; it has them for .* more"):
        read_adam_state(run.last, ["another.weight"])


def test_plain_name():
    assert plain_name("base_model.model.q.lora_A.default.weight") == "base_model.model.q.lora_A.weight"
    assert plain_name("module.base_model.q.lora_B.weight") == "base_model.q.lora_B.weight"
    assert plain_name("x.lora_embedding_A.default") == "x.lora_embedding_A"
    assert plain_name("base_model.module_list.0.weight") == "base_model.module_list.0.weight"


def less_readme():
    """420 steps with total batch 128: 13 of warm-up, then in a line from 2e-5 to 0, logged as transformers 4 did: what
    the scheduler says after the step."""
    return {step: 2e-5 * (step / 13 if step < 13 else (420 - step) / (420 - 13)) for step in range(1, 421)}


def test_learning_rates_are_those_of_less_readme():
    """Published for checkpoints 105, 211, 317 and 420; they are the means of four equal epochs of 105 steps."""
    published = (1.6877e-5, 1.2859e-5, 7.7030e-6, 2.5616e-6)
    for epoch, rate in enumerate(published):
        assert mean_learning_rate(less_readme(), 105 * epoch, 105 * (epoch + 1)) == pytest.approx(rate, rel=2.5e-3)
    for since, step, rate in zip((0, 105, 211, 317), (105, 211, 317, 420), published, strict=True):
        assert mean_learning_rate(less_readme(), since, step) == pytest.approx(rate, rel=2.5e-2)


def test_learning_rates_of_a_run_that_logged_every_tenth_step():
    every, tenth = less_readme(), {s: rate for s, rate in less_readme().items() if s % 10 == 0}
    for since, step in ((105, 211), (211, 317), (317, 420)):
        assert mean_learning_rate(tenth, since, step) == pytest.approx(mean_learning_rate(every, since, step), rel=1e-9)
    assert mean_learning_rate(tenth, 0, 105) == pytest.approx(mean_learning_rate(every, 0, 105), rel=0.02)


def test_edges_of_learning_rates():
    assert mean_learning_rate({}, 0, 3) is None
    assert mean_learning_rate({1: 1.0}, 3, 3) is None
    assert mean_learning_rate({5: 2.0}, 0, 10) == 2.0
    assert mean_learning_rate({2: 1.0, 3: 0.5}, 3, 6) == 0.0  # goes on down to 0 and stays there


def test_a_run_is_opened_by_step(run):
    checkpoints = open_checkpoints(run.folder)
    assert [(c.folder.name, c.step) for c in checkpoints] == [(f"checkpoint-{i}", i) for i in (1, 2, 3)]
    assert [c.learning_rate for c in checkpoints] == pytest.approx([1e-3, 2e-3, 3e-3])
    some = open_checkpoints([run.last, str(run.folder / "checkpoint-1")])
    assert [(c.step, c.learning_rate) for c in some] == [(1, pytest.approx(1e-3)), (3, pytest.approx(2.5e-3))]
    (run.folder / "checkpoint-1" / "trainer_state.json").unlink()  # its name says the step, the others' logs the rate
    assert [c.learning_rate for c in open_checkpoints(run.folder)] == pytest.approx([1e-3, 2e-3, 3e-3])
    for step in (2, 3):
        (run.folder / f"checkpoint-{step}" / "trainer_state.json").unlink()
    assert [(c.step, c.learning_rate) for c in open_checkpoints(run.folder)] == [(1, None), (2, None), (3, None)]


def test_loads_the_adapter_beside_its_base(run):
    checkpoint = open_checkpoints(run.folder)[-1]
    loaded = checkpoint.load(device="cpu")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.inference_mode():
        run.model.eval()
        assert torch.equal(loaded.model(input_ids=ids).logits, run.model(input_ids=ids).logits)
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert [name for name, _ in loaded.model.named_parameters() if "lora_" in name] == run.names
    assert loaded.tokenizer("a b").input_ids == [0, 1] and loaded.max_positions == 64
    (run.last / "adapter_config.json").write_text(
        json.dumps(json.loads((run.last / "adapter_config.json").read_text()) | {"base_model_name_or_path": "moved"})
    )
    pair = load_model(tiny_pair())
    beside = open_checkpoints(run.last)[0].load(pair)
    with torch.inference_mode():
        assert torch.equal(beside.model(input_ids=ids).logits, run.model(input_ids=ids).logits)
    assert list(checkpoint.shapes) == [plain_name(name) for name in sorted(run.names)]
    weights = load_file(run.last / "adapter_model.safetensors")
    assert all(checkpoint.shapes[name] == tuple(tensor.shape) for name, tensor in weights.items())


def test_fingerprint_follows_the_adapter_and_the_moments(run):
    before = open_checkpoints(run.last)[0].fingerprint
    assert before == open_checkpoints(run.last)[0].fingerprint != open_checkpoints(run.folder)[0].fingerprint
    torch.save(run.by_name(), run.last / "optimizer.pt")
    assert open_checkpoints(run.last)[0].fingerprint != before


def test_refuses_a_base_that_does_not_fit(run):
    shallow = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | {"num_hidden_layers": 1})))
    wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | {"hidden_size": 32})))
    deep = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | {"num_hidden_layers": 3})))
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=60))
    for model in (wide, deep, gpt2, shallow):
        with pytest.raises(InputError, match="does not fit its base"):
            open_checkpoints(run.last)[0].load((model, tiny_pair()[1]))


def test_refuses_folders(run, tmp_path):
    with pytest.raises(InputError, match="no checkpoint was named"):
        open_checkpoints([])
    with pytest.raises(InputError, match="nowhere: there is no such folder"):
        open_checkpoints(tmp_path / "nowhere")
    with pytest.raises(InputError, match="neither checkpoint-N folders nor adapter_config.json.*output_dir"):
        open_checkpoints(tmp_path)
    with pytest.raises(InputError, match="is a whole model, not an adapter.*fastsel warmup"):
        open_checkpoints(run.base)
    with pytest.raises(InputError, match="are both of step 3"):
        open_checkpoints([run.last, run.folder])
    other = shutil.copytree(run.last, tmp_path / "final")
    (other / "trainer_state.json").unlink()
    assert open_checkpoints(other)[0].step == 0
    with pytest.raises(InputError, match="of which step is it.*trainer_state.json is missing"):
        open_checkpoints([other, run.last])
    (run.last / "trainer_state.json").write_text("{")
    with pytest.raises(InputError, match="trainer_state.json cannot be read"):
        open_checkpoints(run.last)
    (run.last / "trainer_state.json").write_text("[]")
    with pytest.raises(InputError, match="holds no JSON object"):
        open_checkpoints(run.last)
    (run.last / "trainer_state.json").unlink()
    (run.last / "adapter_model.safetensors").rename(run.last / "adapter_model.bin")
    with pytest.raises(InputError, match="only pickled weights .adapter_model.bin."):
        open_checkpoints(run.last)
    config = json.loads((run.last / "adapter_config.json").read_text())
    (run.last / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(InputError, match="is a IA3 adapter"):
        open_checkpoints(run.last)


def test_refuses_sharded_weights_with_the_command_that_merges_them(tmp_path):
    shards = tmp_path / "checkpoint-5" / "pytorch_model_fsdp_0"
    shards.mkdir(parents=True)
    (shards / ".metadata").write_bytes(b"")
    with pytest.raises(InputError, match=f"accelerate merge-weights {shards} {shards.parent}"):
        open_checkpoints(tmp_path)


def test_refuses_dora_by_its_name(tmp_path):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_dora": True}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is a DoRA adapter.*use_dora=False"):
        open_checkpoints(folder)


def with_tokenizer(run, folder, words):
    """The last checkpoint with a tokenizer of these words beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    copy = shutil.copytree(open_checkpoints(run.folder)[-1].folder, folder / "checkpoint-3")
    of_words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    of_words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=of_words, unk_token="[UNK]").save_pretrained(copy)
    return open_checkpoints(copy)[0]


def test_a_tokenizer_that_reads_otherwise_is_warned_about(tmp_path):
    run = Run(tmp_path)
    with pytest.warns(FastselWarning, match="reads texts in other tokens than its base's"):
        with_tokenizer(run, tmp_path / "other", ["a", "The", "[UNK]", "b"]).load(tiny_pair())
    with_tokenizer(run, tmp_path / "same", ["a", "b", "[UNK]"]).load(tiny_pair())


def test_refuses_a_tokenizer_with_more_tokens_than_embeddings(tmp_path):
    run = Run(tmp_path)
    larger = with_tokenizer(run, tmp_path / "larger", ["a", "b", "[UNK]", *map(str, range(80))])
    with pytest.raises(InputError, match="goes to token 82, its base has 60 embeddings"):
        larger.load(tiny_pair())
