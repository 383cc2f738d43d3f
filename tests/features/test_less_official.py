"""LESS's features to the letter, against a transcription of collect_grads and TRAK 0.3.2's BasicProjector."""

import pytest
import torch

from fastsel.features.gradient_rows import AdamMoments
from fastsel.features.less_official import official_features


def transcribed(gradients, k, moments):
    """Rows one by one, stacked by sixteen, cast to float16, then to the model's type, times blocks of 128 columns."""
    full, projected = [], []
    for count, g in enumerate(gradients, 1):
        if moments is not None:
            updated_avg = 0.9 * moments.exp_avg + (1 - 0.9) * g
            updated_avg_sq = 0.999 * moments.exp_avg_sq + (1 - 0.999) * g**2
            g = updated_avg / torch.sqrt(updated_avg_sq + 1e-08)
        full.append(g)
        if count % 16 == 0 or count == len(gradients):
            x = torch.stack(full).to(torch.float16).to(dtype=gradients.dtype)
            out = torch.zeros(len(x), k, dtype=gradients.dtype)
            width = min(k, 128)
            for index in range(-(-k // width)):
                generator = torch.Generator().manual_seed(int(1e3) * index)
                block = torch.empty(x.shape[1], width, dtype=gradients.dtype)
                block.bernoulli_(p=0.5, generator=generator)
                block = block * 2.0 - 1.0
                stop = min(k, (index + 1) * width)
                out[:, index * width : stop] = x @ block[:, : stop - index * width]
            projected.append(out)
            full = []
    return torch.cat(projected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_adam", [True, False])
@pytest.mark.parametrize("k", [512, 200])
def test_all_bits_are_those_of_the_transcription(dtype, with_adam, k):
    generator = torch.Generator().manual_seed(0)
    p, n = 700, 38
    gradients = (torch.randn(n, p, generator=generator) * 1e-3).to(dtype)
    gradients[5] = 0  # a fully masked row: Adam's momentum alone
    moments = AdamMoments(torch.randn(p, generator=generator) * 1e-4, torch.rand(p, generator=generator) * 1e-7, 10)
    moments = moments if with_adam else None
    got = official_features(gradients, k, moments=moments)
    assert got.dtype == dtype
    assert torch.equal(got, transcribed(gradients, k, moments))


def test_no_rows():
    assert official_features(torch.zeros(0, 5), 16).shape == (0, 16)
