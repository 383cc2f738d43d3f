"""The methods that exist, what each is, and which options it takes: one literal table.

The command line reads its flags and defaults here, so that help needs neither the method's module nor torch;
tests/commands/test_catalogue.py holds the table to the signatures of the functions.
"""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from fastsel.errors import UsageError


@dataclass(frozen=True)
class Method:
    """One row of `fastsel methods`.

    Attributes:
        name: the paper's short name; also the function in fastsel and the module in fastsel.methods.
        title: the paper, or what a baseline does.
        venue: where it appeared; "baseline" where there is no paper to follow.
        task_type: what the chosen rows are for, and whether target examples are needed.
        representation: what is computed for each row.
        diversity: how near-duplicates are kept apart, if at all.
        quality: what makes a row rank high.
        defaults: the options the function takes beside the pool and `budget`, with their defaults.
        ratio_above_one_is_dropped: for ready-made scores of this kind, rows above 1 are not eligible.
        largest: True when a high score is kept.
        ready_scores: what --score-column does: "instead" (the column replaces what the method computes), "beside" (the
            method reads it) or "none".
        in_turn: rows are chosen one after another, so that another budget means choosing anew (from kept vectors).
    """

    name: str
    title: str
    venue: str
    task_type: str
    representation: str
    diversity: str
    quality: str
    defaults: dict[str, Any] = field(default_factory=dict)
    ratio_above_one_is_dropped: bool = False
    largest: bool = True
    ready_scores: str = "instead"
    in_turn: bool = False
    status: str = "available"

    @property
    def runs_shards(self) -> bool:
        """Whether a model runs over the pool, shard by shard."""
        return "model" in self.defaults or "encoder" in self.defaults

    def load(self) -> Any:
        """The method's function; imports its module."""
        return getattr(import_module(f"fastsel.methods.{self.name}"), self.name)


_CHOICE: dict[str, Any] = {"seed": 0, "per": None}
_MODEL: dict[str, Any] = {
    "model": "bundled",
    "max_length": None,
    "overflow": "truncate",
    "turns": "all",
    "official": False,
    "device": "auto",
    "dtype": "auto",
    "implementation": "auto",
    "batch_tokens": None,
}
_EMBED: dict[str, Any] = {
    "encoder": "bundled",
    "text": "instruction",
    "pooling": "auto",
    "max_length": None,
    "device": "auto",
    "dtype": "auto",
    "implementation": "auto",
    "batch_tokens": None,
}
# Of `fastsel warmup`; `warmup_fraction` is the function's `fraction`.
WARMUP: dict[str, Any] = {
    "model": "bundled",
    "warmup_fraction": 0.05,
    "epochs": 4,
    "lora_r": 128,
    "lora_alpha": None,
    "lora_dropout": 0.1,
    "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "learning_rate": 2e-5,
    "warmup_ratio": 0.03,
    "rows_a_step": 32,
    "template": "less",
    "max_length": None,
    "official": False,
    "device": "auto",
    "dtype": "auto",
    "batch_tokens": None,
}

# Of methods on the gradients of a LoRA run.
_GRADIENTS: dict[str, Any] = {
    "target": None,
    "subtask_column": None,
    "checkpoints": None,
    "model": None,
    "warmup_fraction": 0.05,
    "epochs": 4,
    "lora_r": 128,
    "learning_rate": 2e-5,
    "template": "less",
    "max_length": None,
    "overflow": "truncate",
    "turns": "all",
    "leaks": "near",
    "drop_leaks": False,
    "device": "auto",
    "dtype": "auto",
    "implementation": "auto",
    "batch_tokens": None,
}

_ROWS = (
    Method(
        name="ifd",
        title="From Quantity to Quality: Boosting LLM Performance with Self-Guided Data Selection (Cherry LLM)",
        venue="NAACL 2024",
        task_type="instruction tuning, no target set",
        representation="answer loss with and without the instruction",
        diversity="none (--per source for quotas)",
        quality="loss ratio: the instruction helps least, up to 1",
        defaults={**_MODEL, "template": "alpaca", **_CHOICE},
        ratio_above_one_is_dropped=True,
    ),
    Method(
        name="superfiltering",
        title="Superfiltering: Weak-to-Strong Data Filtering for Fast Instruction-Tuning",
        venue="ACL 2024",
        task_type="instruction tuning, no target set",
        representation="answer perplexity with and without the instruction, small model",
        diversity="none, or facility location over the --shortlist (Superfiltering.D)",
        quality="perplexity ratio, up to 1",
        defaults={**_MODEL, "template": "none", "shortlist": None, "encoder": None, **_CHOICE},
        ratio_above_one_is_dropped=True,
    ),
    Method(
        name="mig",
        title="MIG: Automatic Data Selection by Maximizing Information Gain in Semantic Space",
        venue="ACL 2025 Findings",
        task_type="instruction tuning, no target set",
        representation="tags of a row, or the cluster of its embedding",
        diversity="a label is worth less the more of it was chosen; similar labels share",
        quality="annotated scores, or the score column",
        defaults={
            **_EMBED,
            "label_column": "annotation.instag.content",
            "quality_columns": None,
            "valid_tags": None,
            "clusters": None,
            "threshold": 0.9,
            "propagation": 1.0,
            "gain": "first_order",
            "phi": "power",
            "phi_a": 1e-6,
            "phi_b": 0.8,
            "phi_alpha": 1.0,
            "norm": False,
            "official": False,
            **_CHOICE,
        },
        ready_scores="beside",
        in_turn=True,
    ),
    Method(
        name="perplexity",
        title="Answer perplexity under a model",
        venue="baseline",
        task_type="any",
        representation="answer loss given the instruction",
        diversity="none (--per source for quotas)",
        quality="highest perplexity",
        defaults={**_MODEL, "template": "alpaca", **_CHOICE},
    ),
    Method(
        name="facility_location",
        title="Facility location: the rows that represent all others best",
        venue="Cornuejols, Fisher, Nemhauser 1977",
        task_type="any, no target set",
        representation="embedding",
        diversity="exact greedy coverage of the pool",
        quality="none (see qdit)",
        defaults={**_EMBED, "similarity": "cosine", "gamma": None, "floor": 0.0, "optimizer": "auto", **_CHOICE},
        ready_scores="none",
        in_turn=True,
    ),
    Method(
        name="k_center",
        title="k-center greedy: each pick is the row farthest from all chosen before",
        venue="Gonzalez 1985; ICLR 2018",
        task_type="any, no target set",
        representation="embedding",
        diversity="farthest first: no row is far from a chosen one",
        quality="none",
        defaults={**_EMBED, "metric": "euclidean", **_CHOICE},
        ready_scores="none",
        in_turn=True,
    ),
    Method(
        name="kmeans",
        title="k-means: rows from every cluster of the pool",
        venue="baseline (NovelSum, 2025)",
        task_type="any, no target set",
        representation="embedding",
        diversity="every cluster gives its share",
        quality="none",
        defaults={**_EMBED, "clusters": 100, "pick": "random", "shares": "proportional", **_CHOICE},
        ready_scores="none",
        in_turn=True,
    ),
    Method(
        name="novelselect",
        title="Measuring Data Diversity for Instruction Tuning (NovelSum): NovelSelect",
        venue="ACL 2025",
        task_type="instruction tuning, no target set",
        representation="embedding",
        diversity="exact greedy: farthest from the chosen, near ones and dense regions weighing most",
        quality="none, or multiplies the novelty: score column, perplexity or reward model",
        defaults={
            **_EMBED,
            "rule": "official",
            "distance_power": 1.0,
            "density_power": 0.5,
            "neighbours": 10,
            "quality": "none",
            "model": None,
            "official": False,
            **_CHOICE,
        },
        ready_scores="beside",
        in_turn=True,
    ),
    Method(
        name="qdit",
        title="Data Diversity Matters for Robust Instruction Tuning (QDIT)",
        venue="EMNLP Findings 2024",
        task_type="instruction tuning, no target set",
        representation="embedding of the instruction, and a quality score",
        diversity="exact greedy coverage of the pool, weight 1 - alpha",
        quality="score column, perplexity or reward model, weight alpha",
        defaults={**_EMBED, "quality": "score", "model": None, "alpha": 0.7, "scale": "minmax", **_CHOICE},
        ready_scores="beside",
        in_turn=True,
    ),
    Method(
        name="repr_filter",
        title="Representation filter of DEITA: best rows first, none too similar to a kept one",
        venue="ICLR 2024",
        task_type="instruction tuning, no target set",
        representation="embedding of the conversation",
        diversity="cosine to every kept row at most a threshold",
        quality="score column, if there is one",
        defaults={**_EMBED, "text": "conversation", "threshold": 0.9, "rank_by": "auto", "official": False, **_CHOICE},
        ready_scores="beside",
        in_turn=True,
    ),
    Method(
        name="diverse_evol",
        title="Self-Evolved Diverse Data Sampling for Efficient Instruction Tuning (DiverseEvol)",
        venue="arXiv 2311.08182",
        task_type="instruction tuning, no target set",
        representation="mean hidden state of a model trained on the rows kept so far",
        diversity="k-center: each round adds the rows farthest from those kept",
        quality="none",
        defaults={
            "model": "bundled",
            "encoder": None,
            "train": "adapter",
            "start_rows": 100,
            "query_rows": 100,
            "epochs": 3,
            "learning_rate": 2e-4,
            "lora_rank": 8,
            "max_length": None,
            "official": False,
            "device": "auto",
            "dtype": "auto",
            "implementation": "auto",
            "batch_tokens": None,
            "seed": 0,
        },
        ready_scores="none",
        in_turn=True,
    ),
    Method(
        name="less",
        title="LESS: Selecting Influential Data for Targeted Instruction Tuning",
        venue="ICML 2024",
        task_type="instruction tuning for a target",
        representation="Adam's step on a row's LoRA gradient, at the checkpoints of a warm-up",
        diversity="several targets take turns",
        quality="the step points where the target's gradients point",
        defaults={
            **_MODEL,
            "model": None,
            "target": None,
            "subtask_column": None,
            "checkpoints": None,
            "mode": None,
            "sketch_size": 8192,
            "aggregation": "official",
            "eps_mode": "inside",
            "combine": "round_robin",
            "warmup_fraction": 0.05,
            "epochs": 4,
            "lora_r": 128,
            "learning_rate": 2e-5,
            "template": "less",
            "leaks": "near",
            "drop_leaks": False,
            **_CHOICE,
        },
        ready_scores="none",
        in_turn=True,
    ),
    Method(
        name="g2is",
        title="Beyond Similarity: A Gradient-based Graph Method for Instruction Tuning Data Selection (G2IS)",
        venue="ACL 2025",
        task_type="targeted instruction tuning (--target)",
        representation="Adam's step on a row's LoRA gradient, projected, at the last checkpoint of a warm-up",
        diversity="walks along what the target's gradients differ in; no two rows of a walk conflict",
        quality="most like the row chosen before, as long as the walk keeps its direction",
        defaults={
            **_GRADIENTS,
            "gradients": None,
            "target_gradients": None,
            "variance": 0.5,
            "consistency": 0.8,
            "sketch_size": 8192,
            "eps_mode": "inside",
            "official": False,
            **_CHOICE,
        },
        ready_scores="none",
        in_turn=True,
    ),
    Method(
        name="cluster_ucb",
        title="ClusterUCB: Efficient Gradient-Based Data Selection for Targeted Fine-Tuning of LLMs",
        venue="EMNLP 2025 Findings",
        task_type="targeted instruction tuning (--target)",
        representation="LoRA gradients: of all rows at the first checkpoint, of rows that a bandit draws at the last",
        diversity="none; clusters of gradients are the bandit's arms",
        quality="cosine of a row's step with the target's gradients, as LESS",
        defaults={
            **_GRADIENTS,
            "clusters": 100,
            "draw_share": 0.2,
            "cold_start": 0.05,
            "ucb_beta": 1.0,
            "sketch_size": 8192,
            "eps_mode": "inside",
            "official": False,
            **_CHOICE,
        },
        ready_scores="none",
    ),
    Method(
        name="in2core",
        title="In2Core: Leveraging Influence Functions for Coreset Selection in Instruction Finetuning of LLMs "
        "(In2Core-style, by DataInf)",
        venue="EMNLP Findings 2024",
        task_type="targeted instruction tuning (--target)",
        representation="LoRA gradients at the last checkpoint of a run",
        diversity="none (--per source for quotas)",
        quality="most negative influence on the target's loss",
        defaults={
            **_GRADIENTS,
            "lora_r": 8,
            "gradients": None,
            "target_gradients": None,
            "layers": None,
            "damping": 0.1,
            **_CHOICE,
        },
        ready_scores="none",
    ),
    Method(
        name="bm25",
        title="BM25: rows whose words are the target's",
        venue="baseline (LESS, ICML 2024)",
        task_type="instruction tuning for a target",
        representation="words",
        diversity="none (--per source for quotas)",
        quality="shares rare words with the target rows",
        defaults={
            "target": None,
            "subtask_column": None,
            "text": "conversation",
            "aggregate": "mean",
            "k1": 1.5,
            "b": 0.75,
            "leaks": "equal",
            "drop_leaks": False,
            **_CHOICE,
        },
        ready_scores="none",
    ),
    Method(
        name="rds",
        title="Large-Scale Data Selection for Instruction Tuning (RDS+)",
        venue="arXiv 2503.01807",
        task_type="instruction tuning for a target",
        representation="mean hidden state of a language model weighted by position, or any embedding",
        diversity="target rows (or subtasks) take turns",
        quality="nearest to a target row",
        defaults={
            **_EMBED,
            "encoder": "lm:bundled",
            "text": "conversation",
            "target": None,
            "subtask_column": None,
            "aggregate": "round_robin",
            "leaks": "near",
            "drop_leaks": False,
            **_CHOICE,
        },
        ready_scores="none",
        in_turn=True,
    ),
    Method(
        name="length",
        title="Longest answers (Long Is More for Alignment)",
        venue="ICML 2024",
        task_type="instruction tuning, no target set",
        representation="length of the answer",
        diversity="none (--per source for quotas)",
        quality="longest answer",
        defaults=dict(_CHOICE),
        ready_scores="none",
    ),
    Method(
        name="random",
        title="Uniform choice without replacement",
        venue="baseline",
        task_type="any",
        representation="none",
        diversity="by chance",
        quality="none",
        defaults=dict(_CHOICE),
        ready_scores="none",
    ),
    Method(
        name="scores",
        title="Scores that the pool already carries (--score-column)",
        venue="your own",
        task_type="any",
        representation="one column of the pool",
        diversity="none (--per source for quotas)",
        quality="highest score (--keep lowest turns it round)",
        defaults={"keep": "highest", "drop_above": None, **_CHOICE},
        ready_scores="beside",
    ),
)
METHODS: dict[str, Method] = {method.name: method for method in _ROWS}


def find_method(name: str) -> Method:
    """The method of this name.

    Raises:
        UsageError: there is none; the message lists those that exist, the nearest first.
    """
    if name in METHODS:
        return METHODS[name]
    from difflib import get_close_matches

    near = get_close_matches(name, METHODS, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise UsageError(f"there is no method {name!r}{hint} The methods are: {', '.join(METHODS)} (see `fastsel methods`)")
