"""sentence-transformers models: a bidirectional transformer over packed sequences, then its pooling.

A model of transformer, pooling and normalisation runs here: the tokens of a whole batch go through the linear layers as
one row, attention is taken over groups of equally long sequences, and nothing is padded. When it is made, a few
sequences go through packed and separately and the two are compared; a model that differs is padded instead. A model
with more modules than that is run by the library itself, module by module.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fastsel.errors import InputError, UsageError
from fastsel.models.encoders import Reloaded, checked_max_length, folder_fingerprint, read_json
from fastsel.models.loading import DTYPES, quiet_transformers, refuse_pickles, require, resolve_device
from fastsel.models.prepacked import ROWS_MULTIPLE, PrepackedLinears

ATTENTION_NAME = "fastsel_groups"
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
PROBE_LENGTHS = (5, 5, 9, 14)
OWN_POOLING = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
MODULES = ("Transformer", "Pooling", "Normalize")

# (length, how many) of the sequences in the packed row, in order.
_groups: ContextVar[list[tuple[int, int]] | None] = ContextVar("fastsel_equally_long_sequences", default=None)


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls: query [1, h, t, d] -> [1, t, h, d]; each sequence sees itself."""
    groups = _groups.get()
    if groups is None:
        raise RuntimeError(f"attention {ATTENTION_NAME!r} works only inside SentenceEncoder")
    pieces, start = [], 0
    for length, count in groups:
        stop = start + length * count
        q, k, v = (
            x[0, :, start:stop].reshape(x.shape[1], count, length, x.shape[3]).transpose(0, 1)
            for x in (query, key, value)
        )
        out = F.scaled_dot_product_attention(q, k, v, scale=options.get("scaling"))
        pieces.append(out.transpose(1, 2).flatten(0, 1))
        start = stop
    return torch.cat(pieces)[None], None


class SentenceEncoder(Reloaded):
    """See fastsel.models.encoders.Encoder."""

    def __init__(
        self,
        body: Any,
        tokenizer: Any,
        *,
        name: str,
        revision: str | None,
        fingerprint: str,
        pooling: str,
        is_normalised: bool,
        max_length: int,
        prompt: str = "",
    ) -> None:
        """Args: a transformers encoder in evaluation mode, its tokenizer, and what the attributes say."""
        self.name, self.revision, self.fingerprint = name, revision, fingerprint
        self.pooling, self.is_normalised, self.max_length = pooling, is_normalised, max_length
        self.device, self.dtype = str(body.device), str(body.dtype).removeprefix("torch.")
        self.d = int(body.config.hidden_size)
        self._body, self._tokens, self._prompt = body, TokenizerEnds(tokenizer), prompt
        self._linears = PrepackedLinears(body)
        self._first_position: int | None = None
        reason = self._probe()
        self.path = "padded" if reason else "packed"
        self.notes = [f"{name} cannot be packed ({reason}); sequences are padded instead, which is slower"] * bool(
            reason
        )

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """See Encoder."""
        return self._tokens.bare([self._prompt + text for text in texts])

    def sequence(self, tokens: Sequence[int], *, ended: bool = False) -> tuple[list[int], bool]:
        """See Encoder; special tokens are the tokenizer's own, whatever `ended` says."""
        return self._tokens.whole(tokens, self.max_length)

    @torch.inference_mode()
    def embed(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """See Encoder."""
        order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))
        ordered = [sequences[i] for i in order]
        pooled = self._packed(ordered) if self.path == "packed" else self._padded(ordered)
        if self.is_normalised:
            pooled = F.normalize(pooled, dim=1)
        vectors = np.zeros((len(sequences), self.d), np.float32)
        vectors[order] = pooled.float().cpu().numpy()
        return vectors

    def _packed(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """[b, d] pooled; the sequences are sorted by length."""
        lengths = [len(sequence) for sequence in sequences]
        groups = [(length, len(list(equal))) for length, equal in groupby(lengths)]
        fillers = -sum(lengths) % ROWS_MULTIPLE if len(self._linears) else 0
        filled = groups + [(min(left, lengths[-1]), 1) for left in range(fillers, 0, -lengths[-1])]
        input_ids = torch.tensor([token for sequence in sequences for token in sequence] + [0] * fillers)
        positions = torch.cat([torch.arange(length).repeat(count) for length, count in filled])
        options = {"input_ids": input_ids[None], "position_ids": (positions + (self._first_position or 0))[None]}
        with self._switched(filled), self._linears.active():
            hidden = self._body(**{key: value.to(self._body.device) for key, value in options.items()})
        states, start, pooled = hidden.last_hidden_state[0], 0, []
        for length, count in groups:
            pooled.append(self._pool(states[start : start + length * count].view(count, length, -1)))
            start += length * count
        return torch.cat(pooled)

    def _pool(self, states_btd: torch.Tensor) -> torch.Tensor:
        if self.pooling == "mean":
            return states_btd.mean(1)
        return states_btd[:, 0] if self.pooling == "cls" else states_btd[:, -1]

    def _padded(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """[b, d] pooled, a mask telling padding from tokens."""
        input_ids, mask = self._tokens.padded(sequences)
        hidden = self._body(input_ids=input_ids.to(self._body.device), attention_mask=mask.to(self._body.device))
        pooled = [self._pool(s[None, : len(ids)]) for s, ids in zip(hidden.last_hidden_state, sequences, strict=True)]
        return torch.cat(pooled)

    @contextlib.contextmanager
    def _switched(self, groups: list[tuple[int, int]]) -> Iterator[None]:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION_NAME, _attention)  # each time: another process may have been sent this
        before = self._body.config._attn_implementation
        self._body.set_attn_implementation(ATTENTION_NAME)
        token = _groups.set(groups)
        try:
            yield
        finally:
            _groups.reset(token)
            self._body.set_attn_implementation(before)

    @torch.inference_mode()
    def _probe(self) -> str | None:
        """Compare packed with separate sequences, finding where positions start; the reason if they differ, or None."""
        vocabulary = int(self._body.config.vocab_size)
        low, high = vocabulary // 4, max(vocabulary // 4 + 1, vocabulary // 2)
        sequences = [[low + (7 * i * n + i) % (high - low) for i in range(n)] for n in PROBE_LENGTHS]
        apart = torch.cat([self._padded([sequence]) for sequence in sequences]).double()
        reason = "its attention does not go through transformers' AttentionInterface"
        tolerance = PROBE_TOLERANCE.get(self._body.dtype, 1e-1)
        for first_position in (0, self._tokens.pad + 1):  # RoBERTa counts from behind its padding token
            self._first_position = first_position
            try:
                packed = self._packed(sequences).double()
            except (TypeError, ValueError, RuntimeError, IndexError) as error:
                reason = f"it does not take a packed row: {str(error).splitlines()[0]}"
                continue
            difference = float(((packed - apart).norm(dim=1) / apart.norm(dim=1).clamp_min(1e-30)).max())
            if difference <= tolerance:
                return None
            reason = f"a packed forward differs from separate ones by {difference:.1e}"
        return reason


class LibraryEncoder(Reloaded):
    """A model whose modules sentence-transformers runs itself, over padded batches; see encoders.Encoder."""

    def __init__(self, model: Any, *, name: str, revision: str | None, fingerprint: str, max_length: int, prompt: str):
        """Args: a SentenceTransformer, and what the attributes say."""
        self.name, self.revision, self.fingerprint = name, revision, fingerprint
        self.pooling, self.max_length, self.path = "its own", max_length, "library"
        self.is_normalised = type(list(model)[-1]).__name__ == "Normalize"
        self.device, self.dtype = str(model.device), str(next(model.parameters()).dtype).removeprefix("torch.")
        self.notes: list[str] = []
        self._model, self._tokens, self._prompt = model, TokenizerEnds(model.tokenizer), prompt
        self.d = self.embed([self.sequence([self._tokens.pad])[0]]).shape[1]

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """See Encoder."""
        return self._tokens.bare([self._prompt + text for text in texts])

    def sequence(self, tokens: Sequence[int], *, ended: bool = False) -> tuple[list[int], bool]:
        """See Encoder; special tokens are the tokenizer's own, whatever `ended` says."""
        return self._tokens.whole(tokens, self.max_length)

    @torch.inference_mode()
    def embed(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """See Encoder."""
        input_ids, mask = self._tokens.padded(sequences)
        given = {"input_ids": input_ids.to(self.device), "attention_mask": mask.to(self.device)}
        vectors: NDArray[np.float32] = self._model(given)["sentence_embedding"].float().cpu().numpy()
        return vectors


class TokenizerEnds:
    """A transformers tokenizer: bare token ids, and what it puts around them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        places = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
        before = places[0] if places else 0
        self._before, self._behind = full[:before], full[before + len(bare) :]
        self.pad = int(tokenizer.pad_token_id or 0)

    def bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, nothing added or cut."""
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
            truncation=False, padding=False, verbose=False,
        )["input_ids"]  # fmt: skip
        return ids

    def whole(self, tokens: Sequence[int], max_length: int) -> tuple[list[int], bool]:
        """See Encoder.sequence."""
        if not tokens:
            return [], False
        room = max_length - len(self._before) - len(self._behind)
        return [*self._before, *tokens[:room], *self._behind], len(tokens) > room

    def padded(self, sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Input_ids and mask, int64 [b, longest]."""
        longest = max(map(len, sequences))
        input_ids = torch.tensor([[*ids, *[self.pad] * (longest - len(ids))] for ids in sequences])
        lengths = torch.tensor([len(ids) for ids in sequences])
        return input_ids, (torch.arange(longest) < lengths[:, None]).long()


def load_sentence_encoder(
    folder: Path,
    name: str,
    revision: str | None,
    *,
    pooling: str,
    max_length: int | None,
    device: str,
    dtype: str,
) -> SentenceEncoder | LibraryEncoder:
    """Load a folder with a sentence-transformers model, or a bare transformers encoder (pooled by the mean then).

    Raises:
        InputError, UsageError: see load_encoder.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"dtype={dtype!r} does not apply to the encoder {name}: {', '.join(['auto', *DTYPES])}")
    if pooling == "weighted":
        raise UsageError(f"pooling='weighted' is for language models; {name} is none")
    kinds, own_pooling, own_length, body_folder = _read_modules(folder)
    target = resolve_device(device)
    torch_dtype = DTYPES.get(dtype, torch.float32 if target.type == "cpu" else "auto")
    prompt = _default_prompt(folder)
    for part in dict.fromkeys([body_folder, *(path.parent for path in folder.glob("*/*.bin"))]):
        refuse_pickles(part, name, "*.safetensors", "model.save_pretrained(FOLDER)")
    given: dict[str, Any] = {
        "name": name,
        "revision": revision,
        "fingerprint": folder_fingerprint(folder),
        "prompt": prompt,
    }
    is_ours = all(kind in MODULES for kind in kinds) and own_pooling in OWN_POOLING.values()
    try:
        with quiet_transformers():
            if not is_ours:
                if pooling != "auto":
                    raise UsageError(f"pooling={pooling} does not apply: {name} pools with modules of its own")
                return _load_with_library(folder, given, target, torch_dtype, max_length)
            from transformers import AutoModel, AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(body_folder), local_files_only=True, trust_remote_code=False)
            body = AutoModel.from_pretrained(
                str(body_folder),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch_dtype,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if isinstance(error, UsageError):
            raise
        raise InputError(f"encoder {name} cannot be loaded: {(str(error).splitlines() or [''])[0]}") from error
    most = min(int(tokenizer.model_max_length), int(getattr(body.config, "max_position_embeddings", None) or 10**9))
    return SentenceEncoder(
        body.to(target).eval().requires_grad_(False),
        tokenizer,
        pooling=own_pooling if pooling == "auto" else pooling,
        is_normalised="Normalize" in kinds,
        max_length=checked_max_length(max_length, own_length or most, most, name),
        **given,
    )


def _read_modules(folder: Path) -> tuple[list[str], str, int | None, Path]:
    """Kinds of the modules, the pooling ("" for one that is not ours), most tokens of a sequence, the body's folder."""
    if not (folder / "modules.json").exists():
        return ["Transformer", "Pooling"], "mean", None, folder
    modules = read_json(folder / "modules.json")
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    own_pooling, own_length, body_folder = "", None, folder
    for kind, module in zip(kinds, modules, strict=True):
        place = folder / str(module.get("path", ""))
        if kind == "Pooling" and (place / "config.json").exists():
            config = read_json(place / "config.json")
            on = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
            mode = config.get("pooling_mode") or (on[0] if len(on) == 1 else "")
            short = str(mode).removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
            own_pooling = OWN_POOLING.get(short, "")
            if config.get("include_prompt") is False and _default_prompt(folder):
                own_pooling = ""
        if kind == "Transformer":
            body_folder = place
            if (place / "sentence_bert_config.json").exists():
                own_length = read_json(place / "sentence_bert_config.json").get("max_seq_length")
    return kinds, own_pooling, own_length, body_folder


def _default_prompt(folder: Path) -> str:
    path = folder / "config_sentence_transformers.json"
    config = read_json(path) if path.exists() else {}
    chosen = config.get("default_prompt_name")
    return str((config.get("prompts") or {}).get(chosen, "")) if chosen else ""


def _load_with_library(
    folder: Path, given: dict[str, Any], device: torch.device, dtype: Any, max_length: int | None
) -> LibraryEncoder:
    require("sentence_transformers", f"the encoder {given['name']}", "embed")
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(folder), device=str(device), local_files_only=True, trust_remote_code=False,
        model_kwargs={"use_safetensors": True, "dtype": dtype},
    )  # fmt: skip
    own = int(model.max_seq_length or 512)
    most = max(own, int(getattr(model.tokenizer, "model_max_length", own)))
    return LibraryEncoder(model.eval(), max_length=checked_max_length(max_length, own, most, given["name"]), **given)
