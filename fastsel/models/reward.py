"""Reward models: how good an answer is to its prompt, one number a conversation.

A sequence-classification model of transformers with a single label. It is an encoder whose vectors have one entry, so
that shards, resuming, batches and reasons are those of embeddings.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.errors import InputError, UsageError
from fastsel.models.encoders import Reloaded, checked_max_length, folder_fingerprint
from fastsel.models.loading import (
    DTYPES,
    hub_snapshot,
    quiet_transformers,
    refuse_pickles,
    require,
    resolve_device,
)
from fastsel.models.sentence_encoder import TokenizerEnds

MAX_LENGTH = 2048


class RewardModel(Reloaded):
    """See fastsel.models.encoders.Encoder; embed() gives [b, 1]."""

    pooling, path, is_normalised, d = "its own", "padded", False, 1

    def __init__(
        self,
        model: Any,
        *,
        max_length: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        offline: bool = False,
    ) -> None:
        """Load a folder or hub id.

        Raises:
            InputError: it cannot be found or read, or has not one label.
            UsageError: no such dtype or device; more tokens than it has positions.
        """
        require("transformers", "a reward model")
        if dtype != "auto" and dtype not in DTYPES:
            raise UsageError(f"dtype={dtype!r} does not apply to a reward model: {', '.join(['auto', *DTYPES])}")
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        folder, self.name, self.revision = Path(model), str(model), None
        if not folder.exists():
            folder, self.revision = hub_snapshot(self.name, offline)
        refuse_pickles(folder, self.name, "*.safetensors", "model.save_pretrained(FOLDER)")
        target = resolve_device(device)
        source = {"pretrained_model_name_or_path": str(folder), "local_files_only": True, "trust_remote_code": False}
        torch_dtype = DTYPES.get(dtype, torch.float32 if target.type == "cpu" else "auto")
        try:
            with quiet_transformers():
                labels = int(AutoConfig.from_pretrained(**source).num_labels)
                if labels != 1:
                    raise InputError(f"{self.name} has {labels} labels; a reward model has one")
                self.tokenizer = AutoTokenizer.from_pretrained(**source)
                body, report = AutoModelForSequenceClassification.from_pretrained(
                    **source, use_safetensors=True, dtype=torch_dtype, output_loading_info=True
                )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"reward model {self.name} cannot be loaded: {str(error).splitlines()[0]}") from error
        if report["missing_keys"]:
            lacking = sorted(report["missing_keys"])[0]
            raise InputError(f"reward model {self.name} lacks weights ({lacking}, ...): they would be random")
        self._body = body.to(target).eval().requires_grad_(False)
        self._ends = TokenizerEnds(self.tokenizer)
        if self._body.config.pad_token_id is None:  # where the last token is told from padding
            self._body.config.pad_token_id = self._ends.pad
        self.fingerprint = folder_fingerprint(folder)
        self.device, self.dtype = str(self._body.device), str(self._body.dtype).removeprefix("torch.")
        most = int(getattr(self._body.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)
        self.max_length = checked_max_length(max_length, MAX_LENGTH, most, self.name)
        self.notes: list[str] = []
        options = {"max_length": max_length, "device": device, "dtype": dtype, "offline": offline}
        self.origin = (RewardModel, {"model": self.name, **options})

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """See Encoder; the marks of a chat template become its special tokens."""
        return self._ends.bare(texts)

    def sequence(self, tokens: Sequence[int], *, ended: bool = False) -> tuple[list[int], bool]:
        """See Encoder."""
        return self._ends.whole(tokens, self.max_length)

    @torch.inference_mode()
    def embed(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Float32 [b, 1]: the rewards."""
        input_ids, mask = self._ends.padded(sequences)
        given = {"input_ids": input_ids.to(self.device), "attention_mask": mask.to(self.device)}
        rewards: NDArray[np.float32] = self._body(**given).logits.float().cpu().numpy()
        return rewards
