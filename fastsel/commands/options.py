"""Every option of a run, once: its flag, its YAML key, what values it takes, and its line of help.

Flags, `--set`, YAML and the printed configuration are all made from this table. `read` turns whatever was written
(a string from the command line, a number from YAML) into the one value that stands in the resolved configuration, and
is idempotent, so that a printed configuration reads back to itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastsel.errors import UsageError

Reader = Callable[[Any], Any]


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: the key in YAML and the keyword of the API.
        group: heading in the help and in the printed configuration.
        help: one line; `fastsel select METHOD --help` appends the method's default.
        read: raw value -> value, or ValueError with what is wanted.
        metavar: what stands behind the flag in the help; None for a switch.
        many: the flag takes one or more words.
        default: for options that belong to the run and not to the method.
        shapes_result: False when the option cannot change a byte of the chosen rows or of the score files.
        short: a one-letter flag.
    """

    name: str
    group: str
    help: str
    read: Reader
    metavar: str | None = None
    many: bool = False
    default: Any = None
    shapes_result: bool = True
    short: str | None = None

    @property
    def flag(self) -> str:
        """The long flag."""
        return "--" + self.name.replace("_", "-")


def _text(raw: Any) -> str:
    if not isinstance(raw, str) or not raw:
        raise ValueError("wants a text")
    return raw


def _whole(least: int) -> Reader:
    def read(raw: Any) -> int:
        wanted = f"wants a whole number, {least} or more"
        if isinstance(raw, bool) or not isinstance(raw, int | str):
            raise ValueError(wanted)
        try:
            value = int(raw)
        except ValueError:
            raise ValueError(wanted) from None
        if value < least:
            raise ValueError(wanted)
        return value

    return read


def _share(raw: Any) -> float:
    try:
        value = float(raw)
    except (TypeError, ValueError):
        raise ValueError("wants a share from 0 to 1") from None
    if isinstance(raw, bool) or not 0 <= value <= 1:
        raise ValueError("wants a share from 0 to 1")
    return value


def _number(raw: Any) -> float:
    try:
        if isinstance(raw, bool):
            raise TypeError
        return float(raw)
    except (TypeError, ValueError):
        raise ValueError("wants a number") from None


def _number_or_none(raw: Any) -> float | str:
    return "none" if raw == "none" else _number(raw)


def _one_of(*choices: str) -> Reader:
    def read(raw: Any) -> str:
        if raw not in choices:
            raise ValueError("is one of: " + ", ".join(choices))
        return str(raw)

    return read


def _some_of(*choices: str) -> Reader:
    def read(raw: Any) -> list[str]:
        words = raw if isinstance(raw, list) else [raw]
        names = [name for word in words for name in str(word).split(",") if name]
        unknown = [name for name in names if name not in choices]
        if unknown:
            raise ValueError("takes any of: " + ", ".join(choices))
        return [name for name in choices if name in names]

    return read


def _yes_no(raw: Any) -> bool:
    if not isinstance(raw, bool):
        raise ValueError("is true or false")
    return raw


def _paths(raw: Any) -> list[str]:
    paths = raw if isinstance(raw, list) else [raw]
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise ValueError("wants one or more paths")
    return paths


def _texts(raw: Any) -> list[str]:
    words = [word for part in (raw if isinstance(raw, list | tuple) else [raw]) for word in _text(part).split(",")]
    if not words or not all(words):
        raise ValueError("wants one or more names")
    return words


def _mapping(raw: Any) -> dict[str, Any]:
    pairs: list[tuple[Any, ...]]
    if isinstance(raw, dict):
        pairs = list(raw.items())
    else:
        words = raw if isinstance(raw, list) else str(raw).split()
        pairs = [tuple(str(word).split("=", 1)) for word in words]
    if not all(len(pair) == 2 and pair[0] and pair[1] for pair in pairs):
        raise ValueError("wants KEY=COLUMN pairs, as in messages=dialogs")
    return dict(pairs)


def _budget(raw: Any) -> str:
    """One way of writing each budget, so that 0.1 and 10% are the same request."""
    from decimal import Decimal

    from fastsel.budget import Budget  # needs numpy, which help does without

    budget = Budget.parse(raw)
    if budget.unit == "share":
        return f"{Decimal(budget.amount.numerator) * 100 / Decimal(budget.amount.denominator):f}%"
    return f"{budget.amount}{'tok' if budget.unit == 'tokens' else ''}"


def _per(raw: Any) -> Any:
    from fastsel.budget import parse_quotas

    parse_quotas(raw)
    return raw


def _format(raw: Any) -> str:
    from fastsel.io.layout_options import read_layout_options

    return read_layout_options(_text(raw)).format


FORMATS = "messages, prompt_completion, alpaca, sharegpt, tulu, mig, oda, text"
ALSO = ("oda", "dataflex", "instructlab", "less")
SIMILARITIES = ("cosine", "dot", "rbf", "exp_distance")
METRICS = ("euclidean", "cosine")
IMPLEMENTATIONS = ("auto", "triton", "native", "torch", "reference")

POOL, CHOICE, MODEL, MACHINE, OUTPUT = "pool", "choice", "model", "machine", "output"
GROUPS = {
    POOL: "the pool",
    CHOICE: "how many, and which",
    MODEL: "the model and how it reads a row",
    MACHINE: "where and how fast",
    OUTPUT: "the output folder",
}

_ROWS = (
    Option(
        "pool", POOL, "jsonl[.gz|.zst], json, parquet, arrow, a save_to_disk folder, or a quoted glob of shards",
        _paths, "PATH", many=True, shapes_result=False,  # what they hold is in the request by its hash
    ),
    Option("format", POOL, "force a layout; detected per row otherwise: " + FORMATS,
           _format, "NAME", default="auto"),
    Option("columns", POOL, "where the fields are: messages=dialogs prompt=question response=answer",
           _mapping, "KEY=COLUMN", many=True),
    Option("tags", POOL, "the words inside messages: role_tag=role user_tag=human assistant_tag=gpt",
           _mapping, "KEY=WORD", many=True),
    Option("score_column", POOL, "take ready scores from this column, as processed_scores.IFD; no model is needed",
           _text, "COLUMN"),
    Option("limit", POOL, "read only the first N rows", _whole(1), "N"),
    Option("on_error", POOL, "a line that cannot be read: skip it with a reason, or fail",
           _one_of("skip", "fail"), "WHAT", default="skip"),
    Option("max_error_rate", POOL, "stop with exit code 1 when more than this share of lines cannot be read",
           _share, "SHARE", default=0.01),
    Option("budget", CHOICE, "10%% or 0.1 of the pool's rows, 1000 rows, or 2Mtok tokens (1 is one row, 1.0 is all)",
           _budget, "N", default="10%"),
    Option("per", CHOICE, "source (each keeps its share), source=equal, or weights: source=code:2,math:1",
           _per, "QUOTA"),
    Option("target", CHOICE, "files with rows that the model should learn to do, in any layout of a pool",
           _paths, "PATH", many=True),
    Option("subtask_column", CHOICE, "the column of the target that names a row's subtask, dotted for nested ones",
           _text, "COLUMN"),
    Option("aggregate", CHOICE, "over target rows: mean or max of a subtask, then the best one; round_robin: by turns",
           _one_of("mean", "max", "round_robin"), "HOW"),
    Option("k1", CHOICE, "of BM25: how fast more of the same word stops to count", _number, "X"),
    Option("b", CHOICE, "of BM25: how much long rows are held back, 0 to 1", _share, "X"),
    Option("leaks", CHOICE, "target rows in the pool that are looked for: near (by embedding), equal, or none",
           _one_of("near", "equal", "none"), "WHICH"),
    Option("drop_leaks", CHOICE, "leave out pool rows that hold a target row", _yes_no),
    Option("aggregation", CHOICE, "of a subtask: official (mean of cosines) or paper (cosine with its mean)",
           _one_of("official", "paper"), "WHICH"),
    Option("combine", CHOICE, "several targets: round_robin (by turns), or union (each chooses its own budget)",
           _one_of("round_robin", "union"), "HOW"),
    Option("keep", CHOICE, "highest or lowest scores", _one_of("highest", "lowest"), "WHICH"),
    Option("drop_above", CHOICE, "rows with a higher score are not eligible (1 for IFD)", _number, "SCORE"),
    Option("similarity", CHOICE, "of two rows: " + ", ".join(SIMILARITIES), _one_of(*SIMILARITIES), "NAME"),
    Option("gamma", CHOICE, "of rbf (exp(-gamma d^2)) and exp_distance (exp(-gamma d))", _number, "X"),
    Option("floor", CHOICE, "similarities below it count as it; none keeps negative ones", _number_or_none, "X"),
    Option("optimizer", CHOICE, "auto (exact), or to approximate it: stochastic, threshold or partitioned",
           _one_of("auto", "incremental", "lazy", "naive", "stochastic", "threshold", "partitioned"), "NAME"),
    Option("metric", CHOICE, "of the distance: " + ", ".join(METRICS), _one_of(*METRICS), "NAME"),
    Option("clusters", CHOICE, "number of clusters (left out: what the method says)", _whole(1), "N"),
    Option("pick", CHOICE, "rows of a cluster: random, or nearest to its centre",
           _one_of("random", "nearest"), "WHICH"),
    Option("shares", CHOICE, "rows a cluster gives: proportional to its size, or equal",
           _one_of("proportional", "equal"), "HOW"),
    Option("threshold", CHOICE, "cosine above which rows (repr_filter) or labels (mig) are alike",
           _number, "COSINE"),
    Option("rank_by", CHOICE, "order in which rows are looked at: auto (the score column, else random), score, pool "
           "or random", _one_of("auto", "score", "pool", "random"), "WHAT"),
    Option("quality", CHOICE, "score (the score column), perplexity, reward (a reward model), or none (novelselect)",
           _one_of("score", "perplexity", "reward", "none"), "WHAT"),
    Option("alpha", CHOICE, "weight of quality, from 0 (diversity only) to 1", _share, "SHARE"),
    Option("rule", CHOICE, "official (the authors' code) or paper", _one_of("official", "paper"), "WHICH"),
    Option("distance_power", CHOICE, "how fast a far chosen row loses its say: 0 adds all distances up", _number, "X"),
    Option("density_power", CHOICE, "how much less rows of dense regions count; 0 not at all", _number, "X"),
    Option("neighbours", CHOICE, "rows whose distance says how dense a region is", _whole(1), "N"),
    Option("scale", CHOICE, "of diversity and quality before they are added: raw, mean, minmax or zscore",
           _one_of("raw", "mean", "minmax", "zscore"), "HOW"),
    Option("shortlist", CHOICE, "20%% or rows: choose among that many best rows by facility location over embeddings",
           _budget, "N"),
    Option("label_column", CHOICE, "where a row's tags are, as annotation.instag.content", _text, "COLUMN"),
    Option("quality_columns", CHOICE, "numbers, or one a turn, that are multiplied into a row's quality",
           _texts, "COLUMN", many=True),
    Option("valid_tags", CHOICE, "a .json list of the tags that count (all when left out)", _text, "FILE"),
    Option("propagation", CHOICE, "weight of similar labels beside the label itself; 0 switches it off", _number, "X"),
    Option("gain", CHOICE, "first_order (the slope) or exact (the difference)", _one_of("first_order", "exact"),
           "HOW"),
    Option("phi", CHOICE, "what a label's weight is worth: power ((x + a)^b) or exp (1 - e^(-alpha x))",
           _one_of("power", "exp"), "CURVE"),
    Option("phi_a", CHOICE, "a of power: the smaller, the more a label counts that no chosen row has", _number, "A"),
    Option("phi_b", CHOICE, "b of power, at most 1", _number, "B"),
    Option("phi_alpha", CHOICE, "alpha of exp", _number, "X"),
    Option("norm", CHOICE, "divide a row's quality by the number of its tags", _yes_no),
    Option("gradients", CHOICE, "your own: a .npy matrix or a .pt tensor (LESS's all_orig.pt), a row for each pool row",
           _text, "FILE"),
    Option("target_gradients", CHOICE, "the same for the target's rows", _text, "FILE"),
    Option("variance", CHOICE, "share of the target gradients' variance whose components are walked along", _share,
           "SHARE"),
    Option("consistency", CHOICE, "least share of the agreement with a component that a walk keeps with each row",
           _number, "DELTA"),
    Option("draw_share", CHOICE, "share of the rows that get a gradient at the last checkpoint", _share, "SHARE"),
    Option("cold_start", CHOICE, "share of each cluster that is drawn before the bandit begins", _share, "SHARE"),
    Option("ucb_beta", CHOICE, "weight of the rewards' standard deviation in a cluster's bound", _number, "X"),
    Option("damping", CHOICE, "of a layer, as a share of its mean squared gradient", _number, "X"),
    Option("layers", CHOICE, "LoRA matrices that count, by a part of their name, such as layers.29 (all when left out)",
           _texts, "PART", many=True),
    Option("start_rows", CHOICE, "rows drawn at random before the first round", _whole(1), "N"),
    Option("query_rows", CHOICE, "rows that a round adds", _whole(1), "N"),
    Option("seed", CHOICE, "for what is drawn at random", _whole(0), "N", default=0),
    Option("model", MODEL, "bundled, a Hugging Face id, a folder, a .gguf file, or a peft adapter folder",
           _text, "MODEL"),
    Option("encoder", MODEL, "bundled, a sentence-transformers or model2vec id or folder, lm:MODEL, or a .npy matrix",
           _text, "ENCODER"),
    Option("text", MODEL, "what is embedded: instruction, answer, conversation or template:NAME", _text, "WHICH"),
    Option("pooling", MODEL, "auto, mean, weighted (by position; language models), last or cls",
           _one_of("auto", "mean", "weighted", "last", "cls"), "HOW"),
    Option("train", MODEL, "what is trained on the rows kept: adapter, or none", _one_of("adapter", "none"), "WHAT"),
    Option("epochs", MODEL, "of each training", _whole(1), "N"),
    Option("learning_rate", MODEL, "of each training, at its highest", _number, "X"),
    Option("lora_rank", MODEL, "of the adapter", _whole(1), "N"),
    Option("checkpoints", MODEL, "folders of a LoRA run (its output_dir, or checkpoint-N); left out, one is trained",
           _paths, "DIR", many=True, shapes_result=False),  # what they hold is in the request by its hash
    Option("mode", MODEL, "direct (whole gradients), sketch (projected, for other targets later), or trak (LESS's)",
           _one_of("direct", "sketch", "trak"), "HOW"),
    Option("sketch_size", MODEL, "numbers that a gradient is projected to", _whole(1), "K"),
    Option("eps_mode", MODEL, "Adam's eps: inside the root (LESS's code), or outside (as published)",
           _one_of("inside", "outside"), "WHERE"),
    Option("warmup_fraction", MODEL, "share of the pool's rows that the warm-up trains on", _share, "SHARE"),
    Option("lora_r", MODEL, "rank of the adapter", _whole(1), "N"),
    Option("lora_alpha", MODEL, "alpha of the adapter, whose scale is alpha / r (left out: 4 r)", _number, "X"),
    Option("lora_dropout", MODEL, "in front of the adapter, in training", _share, "SHARE"),
    Option("target_modules", MODEL, "layers that get an adapter, by name, or all-linear", _texts, "NAME", many=True),
    Option("warmup_ratio", MODEL, "share of the steps over which the learning rate rises", _share, "SHARE"),
    Option("rows_a_step", MODEL, "rows for each step of the optimizer", _whole(1), "N"),
    Option("template", MODEL, "auto, tokenizer, none, alpaca, wiz, vicuna, tulu, less, or a .jinja, .yaml, .json file",
           _text, "TEMPLATE"),
    Option("max_length", MODEL, "longest row in tokens (the paper's when left out)", _whole(1), "N"),
    Option("overflow", MODEL, "a longer row: truncate, skip or error",
           _one_of("truncate", "skip", "error"), "WHAT"),
    Option("turns", MODEL, "answers of a multi-turn row that count: all or last", _one_of("all", "last"), "WHICH"),
    Option("official", MODEL, "the authors' released code, quirks included (to compare with published numbers)",
           _yes_no),
    Option("device", MACHINE, "auto, cpu, cuda or cuda:1", _text, "DEVICE"),
    Option("dtype", MACHINE, "auto, float32, bfloat16, float16, 8bit or 4bit", _text, "DTYPE"),
    Option("implementation", MACHINE, "of the kernels: " + ", ".join(IMPLEMENTATIONS),
           _one_of(*IMPLEMENTATIONS), "NAME"),
    Option("batch_tokens", MACHINE, "tokens in one forward pass; lower it when memory is short", _whole(1), "N"),
    Option("engine", MACHINE, "where shards of rows run: local (this machine) or ray (a cluster; extra ray)",
           _one_of("local", "ray"), "WHERE", default="local", shapes_result=False),
    Option("workers", MACHINE, "processes with a model each (left out: this one, or what a Ray cluster has room for)",
           _whole(1), "N", shapes_result=False),
    Option("ray_address", MACHINE, "of the Ray cluster; auto finds this machine's; left out, one is started",
           _text, "ADDRESS", shapes_result=False),
    Option("output", OUTPUT, "a new or empty folder; an unfinished run in it goes on", _text, "DIR", short="-o",
           shapes_result=False),
    Option("order", OUTPUT, "of the chosen rows: pool or rank", _one_of("pool", "rank"), "WHICH", default="pool"),
    Option("also", OUTPUT, "write for other tools too: " + ", ".join(ALSO), _some_of(*ALSO), "TOOL", many=True),
    Option("annotate", OUTPUT, "put each row's scores into the row, under the key `fastsel`", _yes_no, default=False),
    Option("report", OUTPUT, "write report.html", _yes_no, default=True),
)  # fmt: skip
OPTIONS: dict[str, Option] = {option.name: option for option in _ROWS}
# Together they say which executor a method that runs a model is handed.
ENGINE = ("engine", "workers", "ray_address")
# What the function of a method is not handed: it belongs to the pool, to the folder, or to the run.
NOT_THE_METHODS_OWN = frozenset(option.name for option in _ROWS if option.group in (POOL, OUTPUT))


def read_value(name: str, raw: Any, origin: str) -> Any:
    """The value of one option; None stays None (an option that is not set).

    Raises:
        UsageError: the value does not fit; names the flag and where the value stood.
    """
    if raw is None:
        return None
    option = OPTIONS[name]
    try:
        return option.read(raw)
    except UsageError:
        raise
    except ValueError as error:
        shown = " ".join(map(str, raw)) if isinstance(raw, list) else raw
        where = "" if origin == "flags" else f" (from {origin})"
        raise UsageError(f"{option.flag} {error}; got {shown!r}{where}") from None
