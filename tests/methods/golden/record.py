"""Record what the authors' code computes on the tiny models: see README.md here.

    python tests/methods/golden/record.py CHERRY_CHECKOUT SUPERFILTERING_CHECKOUT

Their scripts are run from the checkouts as they are; only where a script loads a model or a tokenizer it gets ours.
"""

import json
import math
import runpy
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
import transformers

HERE = Path(__file__).parent
WINDOW = 128
BUILD = runpy.run_path(str(HERE.parent / "conftest.py"))["build_tiny"]


def run_script(script, arguments, model, tokenizer):
    """Run a script as it is, with our model and tokenizer; what it computes is in the files that it writes."""
    with ExitStack() as patches:
        for name, made in (
            ("LlamaTokenizer", tokenizer),
            ("AutoTokenizer", tokenizer),
            ("LlamaForCausalLM", model),
            ("AutoModelForCausalLM", model),
        ):
            loader = getattr(transformers, name)
            patches.enter_context(mock.patch.object(loader, "from_pretrained", return_value=made))
        patches.enter_context(mock.patch.object(sys, "argv", [str(script), *arguments]))
        runpy.run_path(str(script), run_name="__main__")


def plain(number):
    return None if isinstance(number, float) and math.isnan(number) else number


def cherry(checkout, rows, kind, max_length, rate):
    """Losses of each answer token, the share that the script selects, and its row numbers."""
    model, tokenizer = BUILD(kind, WINDOW)
    model.config.output_hidden_states = True
    with tempfile.TemporaryDirectory() as folder:
        pool, scores, chosen = (Path(folder) / name for name in ("pool.json", "scores.pt", "chosen.json"))
        pool.write_text(json.dumps([{**row, "row": i} for i, row in enumerate(rows)]))
        common = ["--prompt", "alpaca", "--max_length", str(max_length)]
        run_script(
            checkout / "cherry_seletion" / "data_analysis.py",
            ["--data_path", str(pool), "--save_path", str(scores), "--model_name_or_path", "x", "--mod", "cherry",
             *common],
            model, tokenizer,
        )  # fmt: skip
        run_script(
            checkout / "cherry_seletion" / "data_by_IFD.py",
            ["--pt_data_path", str(scores), "--json_data_path", str(pool), "--json_save_path", str(chosen),
             "--model_name_or_path", "x", "--sample_rate", str(rate), *common],
            model, tokenizer,
        )  # fmt: skip
        # Selecting everything, at a rate of 1, shows which rows pass the filter.
        everything = Path(folder) / "all.json"
        run_script(
            checkout / "cherry_seletion" / "data_by_IFD.py",
            ["--pt_data_path", str(scores), "--json_data_path", str(pool), "--json_save_path", str(everything),
             "--model_name_or_path", "x", "--sample_rate", "1.0", *common],
            model, tokenizer,
        )  # fmt: skip
        losses = torch.load(scores, weights_only=True)
        return {
            "kind": kind, "window": WINDOW, "max_length": max_length, "rate": rate,
            "loss_cond": [plain(float(torch.log(row["ppl"][2]))) for row in losses],
            "loss_direct": [plain(float(torch.log(row["ppl"][1]))) for row in losses],
            "kept": [row["row"] for row in json.loads(everything.read_text())],
            "selected": [row["row"] for row in json.loads(chosen.read_text())],
        }  # fmt: skip


def superfiltering(checkout, rows, kind, max_length, rate):
    """Loss of both passes, ratio, and the selected rows in the script's order."""
    model, tokenizer = BUILD(kind, WINDOW)
    model.config.output_hidden_states = True
    with tempfile.TemporaryDirectory() as folder:
        pool, scores, scored, chosen = (
            Path(folder) / name for name in ("pool.json", "scores.jsonl", "scored.json", "chosen.json")
        )
        pool.write_text(json.dumps([{**row, "row": i} for i, row in enumerate(rows)]))
        run_script(
            checkout / "code_ifd" / "data_analysis.py",
            ["--data_path", str(pool), "--save_path", str(scores), "--max_length", str(max_length)],
            model, tokenizer,
        )  # fmt: skip
        for script, arguments in (
            (
                "put_analysis_to_data.py",
                ["--pt_data_path", str(scores), "--json_data_path", str(pool), "--json_save_path", str(scored)],
            ),
            (
                "select_data.py",
                ["--json_data_path", str(scored), "--json_save_path", str(chosen), "--sample_rate", str(rate)],
            ),
        ):
            run_script(checkout / "code_ifd" / script, arguments, model, tokenizer)
        losses = [json.loads(line) for line in scores.read_text().splitlines()]
        return {
            "kind": kind, "window": WINDOW, "max_length": max_length, "rate": rate,
            "loss_cond": [plain(row["loss"][3]) if row else None for row in losses],
            "loss_direct": [plain(row["loss"][1]) if row else None for row in losses],
            "ifd_ppl": [plain(row["ifd_ppl"]) for row in json.loads(scored.read_text())],
            "selected": [row["row"] for row in json.loads(chosen.read_text())],
        }  # fmt: skip


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    cherry_checkout, superfiltering_checkout = map(Path, sys.argv[1:3])
    rows = json.loads((HERE / "rows.json").read_text())
    # The trained weights of nothing: ratios lie on both sides of 1, so that the filter has work to do.
    for name, record, checkout, runs in (
        ("cherry", cherry, cherry_checkout, [("llama", 96, 0.3), ("llama-without-start", 96, 0.3), ("gpt2", 128, 0.5)]),
        ("superfiltering", superfiltering, superfiltering_checkout, [("gpt2", 96, 0.0002), ("llama", 96, 0.0002)]),
    ):
        for kind, max_length, rate in runs:
            result = record(checkout, rows, kind, max_length, rate)
            (HERE / f"{name}_{kind}.json").write_text(json.dumps(result, indent=1) + "\n")
            print(name, kind, len(rows), "rows,", len(result["selected"]), "selected")
