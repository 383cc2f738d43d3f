"""IFD end to end against what people run today: the authors' loop, a plain Hugging Face loop, wana, and the floor.

FASTSEL_BENCH_POOL names a pool (the bundled 256 rows by default), FASTSEL_BENCH_ROWS how many of its rows (200); they
are stratified by source with seed 0. FASTSEL_BENCH_WANA_PYTHON names an interpreter of an environment with wana 0.5.1.

Everything scores the rows' flat fields under the authors' rules (official=True) with the same float32 SmolLM2-135M.
A peer whose values differ is not timed.
"""

import json
import os
import resource
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastsel
from fastsel.models.loading import load_model
from fastsel.models.packed import pack

MAX_LENGTH = 512
AUTHORS, PLAIN = "Cherry_LLM's loop", "Hugging Face, labels=, batch 1"
GEMM = "float32 GEMM of the needed flops"
HEADER = "### Response:"
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
WANA = """
import json, sys, time
from wana.adapters.io.jsonl import parse_record
from wana.adapters.logprob.bundled import BundledLogProbProvider
provider = BundledLogProbProvider(threads=int(sys.argv[2]))
examples = [parse_record(row, str(i)) for i, row in enumerate(json.load(open(sys.argv[1])))]
count = 0
evaluate = provider.model.eval
def counted(tokens):
    global count
    count += len(tokens)
    evaluate(tokens)
provider.model.eval = counted
for _ in sys.stdin:
    count, ratios = 0, []
    for example in examples:
        try:
            answer = example.messages[-1].content
            conditioned = provider.mean_nll(example.messages[:-1], answer)
            ratios.append(conditioned / provider.mean_nll((), answer))
        except ValueError:  # longer than its context: no score
            ratios.append(float("nan"))
    print(json.dumps({"ratios": ratios, "tokens": count}), flush=True)
"""


def bench_rows(count):
    """Rows of the pool as users have them, reduced to the flat fields that every peer reads."""
    path = os.environ.get("FASTSEL_BENCH_POOL")
    source = Path(path) if path else files("fastsel").joinpath("data/pool_small.jsonl")
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    chosen = fastsel.random(rows, budget=min(count, len(rows)), per="source", seed=0).indices
    fields = ("instruction", "input", "output")
    return [{field: rows[i][field] for field in fields} for i in sorted(chosen)], f"{count} rows of {source.name}"


@pytest.fixture(scope="module")
def pool():
    return bench_rows(int(os.environ.get("FASTSEL_BENCH_ROWS", "200")))


@pytest.fixture(scope="module")
def loaded():
    return load_model("bundled", device="cpu", dtype="float32")


def prompt_of(row):
    return (WITH_INPUT if row["input"] else WITHOUT_INPUT).format_map(row)


def ours(loaded, rows, **options):
    """IFD per row, NaN where there is none."""
    selection = fastsel.ifd(rows, model=loaded, max_length=MAX_LENGTH, official=True, progress="none", **options)
    return selection.scores


def cherry_part(model, tokenizer, text, answer, max_length):
    """Per-token losses of a whole text, one at a time, and where the answer begins in it."""
    token_ids = tokenizer.encode(text, return_tensors="pt", truncation=True, max_length=max_length)
    first = len(tokenizer.encode(text[: text.rfind(answer)]))
    labels = token_ids.clone()
    labels[0, :first] = -100
    with torch.no_grad():
        outputs = model(token_ids, labels=labels)
    torch.exp(outputs.loss).to("cpu")
    log_softmax, nll_loss = nn.LogSoftmax(dim=-1), nn.NLLLoss(reduction="none")
    losses = []
    for i in range(1, token_ids.shape[1]):
        log_probabilities = log_softmax(outputs.logits[0, i - 1])
        losses.append(nll_loss(log_probabilities.unsqueeze(0), token_ids[0, i].unsqueeze(0)).item())
    return losses[first - 1 :], token_ids.shape[1] - first, token_ids.shape[1]


def cherry_loop(model, tokenizer, rows):
    """Cherry_LLM's scoring (data_analysis.py --mod cherry, then data_by_IFD.py), transcribed."""
    model.config.output_hidden_states = True
    ratios, n_tokens = [], 0
    for row in rows:
        prompt = prompt_of(row)
        prompt_length = len(tokenizer.encode(prompt, truncation=True, max_length=MAX_LENGTH))
        window = MAX_LENGTH - prompt_length + 4
        direct, n_direct, length = cherry_part(model, tokenizer, HEADER + row["output"], row["output"], window)
        conditioned, n_conditioned, more = cherry_part(
            model, tokenizer, prompt + row["output"], row["output"], MAX_LENGTH
        )
        n_tokens += length + more
        fits = (
            prompt_length < MAX_LENGTH and min(n_direct, n_conditioned) > 0 and prompt_length + n_direct <= MAX_LENGTH
        )
        ratios.append(np.mean(conditioned) / np.mean(direct) if fits else float("nan"))
    model.config.output_hidden_states = False
    return np.array(ratios), n_tokens


def sequences_of(tokenizer, row):
    """(token ids, first answer token) of the conditioned and of the direct pass, or None for a row the authors drop."""
    prompt = tokenizer.encode(prompt_of(row))
    header = tokenizer.encode(HEADER)
    conditioned = tokenizer.encode(prompt_of(row) + row["output"])[:MAX_LENGTH]
    direct = tokenizer.encode(HEADER + row["output"])[: max(0, MAX_LENGTH - min(len(prompt), MAX_LENGTH) + 4)]
    n_answer = min(len(conditioned) - len(prompt), len(direct) - len(header))
    if n_answer <= 0 or len(prompt) + len(direct) - len(header) > MAX_LENGTH:
        return None
    return (conditioned, len(prompt)), (direct, len(header))


def plain_loop(model, tokenizer, rows):
    """What one writes first: labels=, batch 1, two forwards a row."""
    ratios, n_tokens = [], 0
    with torch.no_grad():
        for row in rows:
            losses = []
            for token_ids, first in sequences_of(tokenizer, row) or ():
                batch = torch.tensor([token_ids])
                labels = batch.clone()
                labels[0, :first] = -100
                losses.append(model(batch, labels=labels).loss.item())
                n_tokens += len(token_ids)
            ratios.append(losses[0] / losses[1] if losses else float("nan"))
    return np.array(ratios), n_tokens


def same_values(our_scores, peer_result):
    theirs = peer_result[0]
    assert np.array_equal(np.isnan(our_scores), np.isnan(theirs)), "not the same rows have a score"
    assert np.nanmax(np.abs(our_scores - theirs) / theirs) <= 1e-4
    assert np.isfinite(theirs).sum() >= 0.9 * len(theirs)


@pytest.mark.gate
def test_gate_a_few_rows_beat_the_plain_loop(compare, loaded):
    """Short enough for CI, on process-CPU time, which a busy machine hardly changes."""
    rows, case = bench_rows(16)
    found = compare(
        lambda: ours(loaded, rows), lambda: plain_loop(loaded.model, loaded.tokenizer, rows),
        op="ifd", case=case, name=PLAIN, check=same_values, rounds=3,
    )  # fmt: skip
    assert found.ratio_cpu > 1.2


def chat_ifd(model, tokenizer, row):
    """wana's rule: the model's chat template before the answer, against the start token alone."""
    question = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    answer = tokenizer.encode(row["output"], add_special_tokens=False)
    losses = []
    for before in (tokenizer.encode(prompt, add_special_tokens=False), [tokenizer.bos_token_id]):
        batch = torch.tensor([before + answer])
        labels = batch.clone()
        labels[0, : len(before)] = -100
        with torch.no_grad():
            losses.append(model(batch, labels=labels).loss.item())
    return losses[0] / losses[1]


@pytest.fixture
def wana(loaded, pool, tmp_path):
    """wana as a peer: the same weights, quantised as they come, under its own chat template; the gate is that IFD."""
    python = os.environ.get("FASTSEL_BENCH_WANA_PYTHON")
    if not python:
        yield []
        return
    rows, info = pool[0], {}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = [python, "-c", WANA, str(tmp_path / "rows.json"), str(torch.get_num_threads())]

    def computes_ifd(our_scores, ratios):
        assert np.isfinite(our_scores).mean() >= 0.9 and np.isfinite(ratios).mean() >= 0.9
        for row, ratio in list(zip(rows, ratios, strict=True))[:8]:
            assert abs(ratio / chat_ifd(loaded.model, loaded.tokenizer, row) - 1) <= 0.1

    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def call():
            process.stdin.write("\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            info["peer_tokens"] = answer["tokens"]
            return np.array(answer["ratios"])

        def cpu_seconds():
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        yield [{"name": "wana 0.5.1", "call": call, "check": computes_ifd, "cpu_clock": cpu_seconds, "info": info}]
        process.stdin.close()


def needed_flops(model, sequences):
    """Of the tokens that have to be computed: a shared prefix once, logits only for answer tokens."""
    config, packed = model.config, pack([token_ids for token_ids, _ in sequences])
    heads, head_size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    attention = config.hidden_size * head_size * 2 * (heads + config.num_key_value_heads)
    layer = 2 * (attention + 3 * config.hidden_size * config.intermediate_size)
    pairs = int((packed.position_ids + 1).sum())  # of a query and a key it sees
    answers = sum(len(token_ids) - first for token_ids, first in sequences)
    n_tokens = packed.token_ids.numel()
    layers = config.num_hidden_layers * (n_tokens * layer + pairs * 4 * heads * head_size)
    return layers + answers * 2 * config.hidden_size * config.vocab_size, n_tokens, answers


def test_whole_scoring(compare_all, loaded, pool, wana):
    """Against the authors' loop, a plain loop, wana, and the floor: float32 GEMM 1024 x 576 x 1536 of as many flops.

    ratio_cpu of the last is the share of the matrix product's rate that the whole scoring reaches.
    """
    rows, case = pool
    model, tokenizer = loaded.model, loaded.tokenizer
    pairs = [pair for pair in (sequences_of(tokenizer, row) for row in rows) if pair]
    flops, n_needed, n_answers = needed_flops(model, [sequence for pair in pairs for sequence in pair])
    n_tokens = sum(len(token_ids) for pair in pairs for token_ids, _ in pair)
    a, b, out = torch.randn(1024, 576), torch.randn(576, 1536), torch.empty(1024, 1536)

    def products():
        for _ in range(round(flops / (2 * 1024 * 576 * 1536))):
            torch.mm(a, b, out=out)

    found = compare_all(
        lambda: ours(loaded, rows),
        [
            {"name": GEMM, "call": products, "check": None},
            {"name": PLAIN, "call": lambda: plain_loop(model, tokenizer, rows), "check": same_values},
            {"name": AUTHORS, "call": lambda: cherry_loop(model, tokenizer, rows), "check": same_values},
            *wana,
        ],
        op="ifd",
        case=case,
        info={"tokens": n_tokens, "tokens_needed": n_needed, "answer_tokens": n_answers, "teraflops": flops / 1e12},
    )
    assert found[AUTHORS].ratio_cpu > found[PLAIN].ratio_cpu > 1 > found[GEMM].ratio_cpu > 0.3


def test_peak_memory_above_the_loaded_model(benchmark, loaded, pool, peak_memory):
    rows, case = pool
    ours(loaded, rows[:8])  # what the first forward of a process allocates once belongs to the loaded model
    _, peak = benchmark.pedantic(lambda: peak_memory(lambda: ours(loaded, rows)), rounds=1)
    benchmark.extra_info.update(op="ifd", case=case, our_peak_bytes=peak)
    assert peak <= 1e9 + 200 * len(rows)


@pytest.mark.gate
@pytest.mark.parametrize("command", ["import fastsel", "fastsel --help"])
def test_starting_takes_under_a_second(benchmark, command):
    arguments = ["-c", command] if command.startswith("import") else ["-m", *command.split()]

    def start():
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    start()
    before, rounds = resource.getrusage(resource.RUSAGE_CHILDREN), 5
    benchmark.pedantic(start, rounds=rounds)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / rounds
    benchmark.extra_info.update(op="start", case=command, our_cpu_s=cpu_s)
    assert cpu_s <= 1.0
