"""Hidden states of a causal language model, after its final norm, as vectors of whole texts.

Sequences go through models.packed: nothing is padded, common beginnings are computed once. The mean is over all tokens,
special ones included (DiverseEvol); "weighted" weighs the t-th of them by t (SGPT, RDS+); "last" is the state of the
last token (NovelSum, DEITA). None is normalised.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.errors import InputError, UsageError
from fastsel.models.encoders import Reloaded, checked_max_length
from fastsel.models.loading import LoadedModel
from fastsel.models.packed import PackedForward, pack

MAX_LENGTH = 512


class CausalEncoder(Reloaded):
    """See fastsel.models.encoders.Encoder."""

    is_normalised = False

    def __init__(
        self, loaded: LoadedModel, *, pooling: str = "auto", max_length: int | None = None, implementation: str = "auto"
    ) -> None:
        """Args: the model, "mean" ("auto" too), "weighted" or "last", the window in tokens (None takes 512), of the
        kernels.
        """
        if pooling not in ("auto", "mean", "weighted", "last"):
            raise UsageError(f"pooling={pooling!r} does not apply to a language model: mean, weighted or last")
        self.name, self.revision, self.fingerprint = loaded.name, loaded.revision, loaded.fingerprint
        self.device, self.dtype = str(loaded.device), str(loaded.dtype).removeprefix("torch.")
        options = {"pooling": pooling, "max_length": max_length, "implementation": implementation}
        self.origin = (CausalEncoder, {"loaded": loaded, **options})
        self.pooling = "mean" if pooling == "auto" else pooling
        most = loaded.max_positions or 1 << 30
        self.max_length = checked_max_length(max_length, MAX_LENGTH, most, loaded.name)
        self._forward = PackedForward(loaded, implementation)
        self.path, self.d = self._forward.path, int(self._forward.head.weight.shape[1])
        self.notes = [note for note in (loaded.note, self._forward.reason) if note]
        self._tokenizer = loaded.tokenizer
        bare, full = self._tokenizer("a", add_special_tokens=False)["input_ids"], self._tokenizer("a")["input_ids"]
        self._start = list(full[: len(full) - len(bare)]) if full[len(full) - len(bare) :] == bare else []

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """See Encoder; special-token strings inside a text stay text."""
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False,
            return_token_type_ids=False, verbose=False,
        )["input_ids"]  # fmt: skip
        return ids

    def sequence(self, tokens: Sequence[int], *, ended: bool = False) -> tuple[list[int], bool]:
        """See Encoder; the end-of-text token comes first under the knife, as in training."""
        if not tokens:
            return [], False
        end = [self._tokenizer.eos_token_id] if ended and self._tokenizer.eos_token_id is not None else []
        whole = [*self._start, *tokens, *end]
        return whole[: self.max_length], len(self._start) + len(tokens) > self.max_length

    def embed(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """See Encoder.

        Raises:
            InputError: the model has no tokens to embed.
        """
        if not sequences:
            raise InputError("there is nothing to embed")
        batch = pack(sequences)
        lengths = [len(sequence) for sequence in sequences]
        if self.pooling == "last":
            rows = torch.cat([batch.rows(i, length - 1, length) for i, length in enumerate(lengths)])
            return self._forward.hidden_states(batch, rows).float().cpu().numpy()
        rows = torch.cat([batch.rows(i, 0, length) for i, length in enumerate(lengths)])
        states_td = self._forward.hidden_states(batch, rows).float()
        pool = _by_position if self.pooling == "weighted" else _mean
        return torch.stack([pool(states) for states in torch.split(states_td, lengths)]).cpu().numpy()


def _mean(states_td: torch.Tensor) -> torch.Tensor:
    return states_td.mean(0)


def _by_position(states_td: torch.Tensor) -> torch.Tensor:
    weights = torch.arange(1, len(states_td) + 1, dtype=torch.float32, device=states_td.device)
    return (weights / weights.sum()) @ states_td
