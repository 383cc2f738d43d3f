"""Memory of a whole run grows by at most 200 bytes a row."""

import json
import subprocess
import sys

import pytest

# A model too small to matter, so that what is measured is what a run keeps of each row.
RUN = """
import resource, sys, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
import fastsel
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).eval()
selection = fastsel.ifd(sys.argv[1], model=(model, tokenizer), template="none", max_length=40, progress="none")
assert len(selection.scores) == int(sys.argv[2]), len(selection.scores)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak_bytes(tmp_path, n_rows):
    pool = tmp_path / f"{n_rows}.jsonl"
    with open(pool, "w") as stream:
        for i in range(n_rows):
            # One row in ten does not fit into the window: rows with a reason must not cost more.
            answer = f"answer {i} " * (5 if i % 10 == 0 else 1)
            stream.write(json.dumps({"id": f"row-{i}", "source": "s", "instruction": f"q{i}", "output": answer}) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(pool), str(n_rows)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_growth_with_the_pool(tmp_path):
    few, many = 10_803, 216_060  # a real pool, and twenty of it
    growth = peak_bytes(tmp_path, many) - peak_bytes(tmp_path, few)
    assert growth <= 100e6 + 200 * (many - few), f"{growth / (many - few):.0f} bytes a row"
