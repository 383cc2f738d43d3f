"""Many sequences through a language model at once, nothing padded and shared prefixes computed once.

A batch is one packed row of tokens. Its segments form a forest: sequences that begin with the same tokens share a
parent segment. transformers runs its own layers on that row; only attention is ours (kernels.tree_attention), plugged
in through its AttentionInterface, and positions continue from the parent.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastsel.errors import FastselWarning, InputError
from fastsel.kernels._runtime.dispatch import recording
from fastsel.kernels.linear_token_stats import linear_token_stats
from fastsel.kernels.tree_attention import Segments, tree_attention
from fastsel.models.forest import PackedBatch, filled_up, pack
from fastsel.models.loading import LoadedModel
from fastsel.models.prepacked import ROWS_MULTIPLE, PrepackedLinears

__all__ = ["HeadParameters", "PackedBatch", "PackedForward", "head_parameters", "pack"]

ATTENTION_NAME = "fastsel_tree"
# Attention keywords that say nothing about which keys a token sees or how they are weighed.
HARMLESS_KEYWORDS = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "position_embeddings",
     "deterministic", "return_dict"}
)  # fmt: skip
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Largest relative difference (2-norm of a row) between a packed and a separate forward that rounding can make.
PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class HeadParameters(NamedTuple):
    """logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), without the tanh if softcap is None."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None
    scale: float


@dataclass
class _Running:
    """What the attention function needs to know of the forward that it is called from, and what it saw."""

    segments: Segments
    implementation: str
    calls: int = 0
    windowed_calls: int = 0


_running: ContextVar[_Running | None] = ContextVar("fastsel_packed_forward", default=None)


class CannotPackError(Exception):
    """The model's attention asks for something that tree_attention does not do; the message says what."""


def refuse_unusual(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    n_tokens: int,
    is_causal: bool | None,
    others: Mapping[str, Any],
) -> None:
    """Raises: CannotPackError when a layer asks for more than causal order, a window, a softcap and a scale."""
    unknown = sorted(name for name, it in others.items() if it is not None and name not in HARMLESS_KEYWORDS)
    if unknown:
        raise CannotPackError(f"its attention sends {', '.join(unknown)}")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise CannotPackError("its attention is not causal")
    if query.shape[2] != n_tokens or key.shape[2] != query.shape[2]:
        raise CannotPackError("its attention runs over other tokens than the packed ones")


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls: query [1, h, t, d] -> [1, t, h, dv]."""
    running = _running.get()
    if running is None:
        raise RuntimeError(f"attention {ATTENTION_NAME!r} works only inside PackedForward")
    refuse_unusual(module, query, key, running.segments.n_tokens, is_causal, others)
    running.calls += 1
    running.windowed_calls += sliding_window is not None
    out = tree_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        running.segments,
        window=sliding_window,
        softcap=softcap,
        scale=scaling,
        implementation=running.implementation,
    )
    return out[None], None


class PackedForward:
    """Hidden states of packed batches from a loaded model.

    When it is made, a small forest goes through the model packed and as separate sequences, and the two are compared.
    A model that cannot be packed exactly (its attention uses more than causal order, windows, softcap and scale) takes
    the padded path: sequences of similar length, padded on the right. It says so once.

    Attributes:
        path: "packed" or "padded".
        reason: why the path is padded, or None.
        head: HeadParameters of the model, checked against its own logits.
        implementations: kernel -> the code that ran it in the comparison, such as "native-avx512vnni": what "auto"
            takes for this model here.

    Raises:
        InputError: the model is not causal, or its logits are not what HeadParameters can say.
    """

    def __init__(self, loaded: LoadedModel, implementation: str = "auto", *, prepack: bool = True) -> None:
        """Compare a packed forward with separate ones.

        Args:
            loaded: the model.
            implementation: of the kernels, "auto" or a name.
            prepack: multiply by oneDNN on a CPU; small models keep a second copy of their weights for it.
        """
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION_NAME, _attention)
        self.loaded = loaded
        self.implementation = implementation
        self.body = loaded.model.base_model
        if self.body is loaded.model:
            raise InputError(
                f"{loaded.name} ({type(loaded.model).__name__}) does not keep its layers apart from its head"
            )
        self.config = loaded.model.config.get_text_config()
        self.head = head_parameters(loaded.model, self.config)
        self.one_by_one = False
        if loaded.device.type == "cpu":
            _keep_freed_memory()
        self._linears = PrepackedLinears(self.body if prepack else torch.nn.Module())
        with recording() as self.implementations:
            self.reason = self._probe()
        self.path = "padded" if self.reason else "packed"
        if self.reason:
            self.implementations.pop("tree_attention", None)  # tried, and not used
            warnings.warn(
                f"{loaded.name} cannot be packed ({self.reason}); sequences are padded instead, which is slower",
                FastselWarning,
                stacklevel=2,
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process is sent the model and makes, and checks, a forward of its own."""
        return PackedForward, (self.loaded, self.implementation)

    def hidden_states(self, batch: PackedBatch, rows: torch.Tensor) -> torch.Tensor:
        """Hidden states [r, d] after the final norm, of the packed rows asked for, in their order.

        Args:
            batch: from pack().
            rows: [r] int64, packed row numbers (PackedBatch.rows).

        Raises:
            ValueError: a sequence is longer than the model's max_positions.
        """
        longest = int(batch.position_ids.max()) + 1 if batch.segments.n_tokens else 0
        limit = self.loaded.max_positions
        if limit is not None and longest > limit:
            raise ValueError(f"a sequence has {longest} tokens, {self.loaded.name} takes at most {limit}")
        with torch.inference_mode():
            if self.path == "padded" or longest > self.same_rotation_until:
                return self._padded(batch, rows)
            if len(self._linears) and batch.segments.n_tokens:
                batch = filled_up(batch, ROWS_MULTIPLE)
            return self._packed(batch, _Running(batch.segments, self.implementation))[rows.to(self.loaded.device)]

    @cached_property
    def same_rotation_until(self) -> float:
        """Above this length some rotary embeddings turn every token of the batch differently."""
        rope = getattr(self.config, "rope_parameters", None) or getattr(self.config, "rope_scaling", None) or {}
        kinds = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
        if not kinds & {"dynamic", "longrope"}:
            return float("inf")
        original = rope.get("original_max_position_embeddings")
        return float(
            original
            or getattr(self.config, "original_max_position_embeddings", None)
            or self.config.max_position_embeddings
        )

    def _packed(self, batch: PackedBatch, running: _Running) -> torch.Tensor:
        device = self.loaded.device
        with attention_switched(self.loaded.model, ATTENTION_NAME), self._linears.active():
            token = _running.set(running)
            try:
                output = self.body(
                    input_ids=batch.token_ids[None].to(device),
                    position_ids=batch.position_ids[None].to(device),
                    use_cache=False,
                )
            finally:
                _running.reset(token)
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def _padded(self, batch: PackedBatch, rows: torch.Tensor) -> torch.Tensor:
        device = self.loaded.device
        segment_r = torch.searchsorted(batch.segments.starts, rows.cpu(), right=True) - 1
        sequence_r = torch.tensor(batch.sequence_of_segment)[segment_r]
        position_r = batch.position_ids[rows.cpu()]
        sequences = {index: batch.sequence(index) for index in set(sequence_r.tolist())}
        apart = self.one_by_one or any(len(ids) > self.same_rotation_until for ids in sequences.values())
        out = torch.empty(len(rows), self.head.weight.shape[1], dtype=self.loaded.dtype, device=device)
        for group in _groups(sequences, 1 if apart else None):
            hidden = self._separate([sequences[index] for index in group])
            for line, index in enumerate(group):
                wanted = (sequence_r == index).nonzero()[:, 0]
                out[wanted.to(device)] = hidden[line][position_r[wanted].to(device)]
        return out

    def _separate(self, sequences: list[torch.Tensor]) -> torch.Tensor:
        """[sequences, longest, d]: as transformers alone does it, padded on the right."""
        longest = max(map(len, sequences))
        input_ids = torch.stack([F.pad(ids, (0, longest - len(ids))) for ids in sequences])
        masks = {}
        if any(len(ids) < longest for ids in sequences):
            lengths = torch.tensor([len(ids) for ids in sequences])
            masks["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long().to(self.loaded.device)
        output = self.body(input_ids=input_ids.to(self.loaded.device), **masks)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    @torch.inference_mode()
    def _probe(self) -> str | None:
        """Compare a packed forward with separate ones; the reason why this model cannot be packed, or None."""
        sequences, batch = _probe_batch(self.head.weight.shape[0])
        apart = [self._separate([ids])[0] for ids in sequences]
        n_shared = PROBE_LENGTHS[0]
        tolerance = PROBE_TOLERANCE.get(self.loaded.dtype, 1e-1)
        if _difference(apart[0][:n_shared], apart[1][:n_shared]) > tolerance:
            raise InputError(f"{self.loaded.name} is not causal: later tokens change what earlier ones predict")
        self._check_head(sequences[0], apart[0], tolerance)
        together = self._separate(sequences)
        self.one_by_one = any(
            _difference(line[: len(ids)], alone) > tolerance
            for line, ids, alone in zip(together, sequences, apart, strict=True)
        )
        kinds = set(getattr(self.config, "layer_types", None) or [])
        if kinds - LAYER_TYPES:
            return f"it has {', '.join(sorted(kinds - LAYER_TYPES))} layers"
        running = _Running(batch.segments, self.implementation)
        try:
            packed = self._packed(batch, running)
        except CannotPackError as error:
            return str(error)
        except (TypeError, ValueError) as error:
            return f"it does not take a packed row: {str(error).splitlines()[0]}"
        if running.calls == 0:
            return "its attention does not go through transformers' AttentionInterface"
        windowed = list(getattr(self.config, "layer_types", None) or []).count("sliding_attention")
        if windowed and running.windowed_calls != windowed:
            return f"{windowed} of its layers have a window, and {running.windowed_calls} tell it to the attention"
        if not windowed and getattr(self.config, "sliding_window", None) and not (kinds or running.windowed_calls):
            return "its configuration has a window, and its layers do not tell it to the attention"
        if getattr(self.config, "attention_chunk_size", None) is not None:
            return "it attends within chunks"
        difference = max(
            _difference(packed[batch.rows(index, 0, len(ids)).to(packed.device)], apart[index])
            for index, ids in enumerate(sequences)
        )
        return (
            f"a packed forward differs from separate ones by {difference:.1e}" if not difference <= tolerance else None
        )

    def _check_head(self, token_ids: torch.Tensor, hidden: torch.Tensor, tolerance: float) -> None:
        logits = self.loaded.model(input_ids=token_ids[None].to(self.loaded.device)).logits[0]
        weight, bias, softcap, scale = self.head
        ours = F.linear(hidden.to(weight.dtype), weight, bias) * scale
        if softcap is not None:
            ours = softcap * torch.tanh(ours / softcap)
        difference = _difference(ours, logits)
        if not difference <= tolerance:
            raise InputError(
                f"{self.loaded.name}: its logits differ by {difference:.1e} from those of its final hidden states and "
                "output embeddings, so that its head does something unknown; name another model"
            )
        # The other kernel of a forward, so that `implementations` names both.
        targets = token_ids[:1].to(hidden.device)
        linear_token_stats(hidden[:1], weight, targets, bias, softcap, scale, implementation=self.implementation)


# Three levels: a shared prompt, a shared beginning of two answers, their ends, and another answer.
PROBE_LENGTHS = [11, 7, 5, 3, 9]


def _probe_batch(vocabulary: int) -> tuple[list[torch.Tensor], PackedBatch]:
    # Small ids: ordinary characters in most vocabularies, no image or special tokens.
    low, high = min(16, vocabulary // 2), min(vocabulary, 250)
    ids = low + (torch.arange(sum(PROBE_LENGTHS)) * 37 + torch.arange(sum(PROBE_LENGTHS)) ** 2) % (high - low)
    prompt, answer, end, other_end, other = torch.split(ids, PROBE_LENGTHS)
    sequences = [torch.cat([prompt, answer, end]), torch.cat([prompt, answer, other_end]), torch.cat([prompt, other])]
    bounds = [0, 11, 18, 23, 26, 35]
    return sequences, PackedBatch(ids, Segments(bounds, [-1, 0, 1, 1, 0]), [2, 3, 4])


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    relative = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(1e-30)
    return float(relative.max())


def _keep_freed_memory() -> None:
    """Let the C library reuse what a layer frees instead of returning it and faulting it in again.

    glibc raises its thresholds for that to the largest block freed so far (at most 32 MB); one free says so before the
    first batch. 803 tokens of SmolLM2-135M: 127,000 page faults -> 0, 2.74 -> 2.26 CPU seconds.
    """
    torch.empty(30 << 20, dtype=torch.uint8)


@contextlib.contextmanager
def attention_switched(model: Any, name: str) -> Iterator[None]:
    """Inside, the model's layers call the attention function that was registered under this name."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def head_parameters(model: Any, config: Any) -> HeadParameters:
    """What the model's configuration (of its text part) says of its head."""
    output = model.get_output_embeddings()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)
    return HeadParameters(
        output.weight.detach(), getattr(output, "bias", None), float(softcap) if softcap else None, scale
    )


def _groups(sequences: dict[int, torch.Tensor], most: int | None, budget: int = 8192) -> Iterator[list[int]]:
    """Sequences of similar length, at most `budget` padded tokens (or one sequence) at a time."""
    group: list[int] = []
    for index in sorted(sequences, key=lambda index: (len(sequences[index]), index)):
        if group and ((len(group) + 1) * len(sequences[index]) > budget or len(group) == most):
            yield group
            group = []
        group.append(index)
    if group:
        yield group
