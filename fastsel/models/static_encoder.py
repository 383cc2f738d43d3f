"""model2vec models: a vector for each token of the vocabulary, their mean for a text. No forward pass."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastsel.errors import InputError, UsageError
from fastsel.models.encoders import Reloaded, checked_max_length, folder_fingerprint
from fastsel.models.loading import require


class StaticEncoder(Reloaded):
    """See fastsel.models.encoders.Encoder; tokens that the vocabulary does not know count for nothing."""

    revision: str | None
    pooling = "mean"
    path = "table"
    device = "cpu"

    def __init__(self, folder: Path, name: str, revision: str | None, *, pooling: str, max_length: int | None) -> None:
        """Load the folder of a model2vec model.

        Raises:
            InputError, UsageError, MissingExtraError: see load_encoder.
        """
        if pooling not in ("auto", "mean"):
            raise UsageError(f"pooling={pooling!r} does not apply to {name}: it has the mean of its tokens' vectors")
        require("model2vec", f"the encoder {name}", "embed")
        from model2vec import StaticModel

        try:
            model = StaticModel.from_pretrained(str(folder), force_download=False)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"encoder {name} cannot be loaded: {(str(error).splitlines() or [''])[0]}") from error
        self.name, self.revision, self.fingerprint = name, revision, folder_fingerprint(folder)
        self.is_normalised, self.d = bool(model.normalize), int(model.dim)
        self.max_length = checked_max_length(max_length, int(model.max_length or 1 << 30), 1 << 30, name)
        self.dtype = str(model.embedding.dtype)
        self.notes: list[str] = []
        self._model = model
        model.tokenizer.no_truncation()

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """See Encoder."""
        return self._model.tokenize(list(texts)) if texts else []

    def sequence(self, tokens: Sequence[int], *, ended: bool = False) -> tuple[list[int], bool]:
        """See Encoder; there are no special tokens."""
        return list(tokens[: self.max_length]), len(tokens) > self.max_length

    def embed(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """See Encoder."""
        table, weights, mapping = self._model.embedding, self._model.weights, self._model.token_mapping
        vectors = np.zeros((len(sequences), self.d), np.float32)
        for i, sequence in enumerate(sequences):
            ids = np.asarray(sequence, np.int64)
            rows = table[ids if mapping is None else mapping[ids]].astype(np.float32)
            vectors[i] = (rows if weights is None else rows * weights[ids][:, None]).mean(0)
        if self.is_normalised:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-32)
        return vectors
