"""Files that LESS and bergson write are read as they are; nothing in them is scored silently, no code is run."""

import json
import pickle

import numpy as np
import pytest
import torch

from fastsel.errors import InputError
from fastsel.features.gradient_files import read_gradient_file


def as_less_writes(folder, dtype=torch.float32):
    """merge_info and merge_and_normalize_info of collect_grad_reps.py, for rows of which one is zero."""
    features = torch.randn(7, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    features[3] = 0
    torch.save(features, folder / "all_unormalized.pt")
    torch.save(torch.nn.functional.normalize(features, dim=1), folder / "all_orig.pt")
    return features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_lesss_files(tmp_path, dtype):
    features = as_less_writes(tmp_path, dtype)
    got = read_gradient_file(tmp_path)  # the whole ones, not the normalised
    np.testing.assert_array_equal(got.matrix.astype(np.float32), features.float().numpy())
    assert not got.is_normalised and list(got.flagged) == [3] and "all zeros" in got.flagged[3]
    assert got.name.endswith("all_unormalized.pt")
    unit = read_gradient_file(tmp_path / "all_orig.pt")
    assert unit.is_normalised and list(unit.flagged) == [3]


def as_bergson_writes(folder, matrix, sizes):
    """create_index of bergson/data.py."""
    formats = [f"({size},){matrix.dtype.str}" for size in sizes.values()]
    dtype = {"names": list(sizes), "formats": formats, "itemsize": matrix.dtype.itemsize * sum(sizes.values())}
    records = np.zeros(len(matrix), np.dtype(dtype))
    start = 0
    for name, size in sizes.items():
        records[name] = matrix[:, start : start + size]
        start += size
    (folder / "gradients.bin").write_bytes(records.tobytes())
    info = {"num_grads": len(matrix), "dtype": dtype, "grad_sizes": sizes, "base_dtype": matrix.dtype.str}
    (folder / "info.json").write_text(json.dumps(info))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_reads_bergsons_folder(tmp_path, dtype):
    matrix = np.random.default_rng(0).normal(size=(5, 12)).astype(dtype)
    matrix[2, 7] = np.nan
    as_bergson_writes(tmp_path, matrix, {"layers.0.q": 4, "layers.0.v": 8})
    got = read_gradient_file(tmp_path)
    assert isinstance(got.matrix, np.memmap)
    np.testing.assert_array_equal(got.matrix, matrix)
    assert got.flagged == {2: "it holds NaN or infinity"}
    (tmp_path / "gradients.bin").write_bytes(b"short")
    with pytest.raises(InputError, match=r"has 5 bytes; info.json says 5 rows of 12"):
        read_gradient_file(tmp_path)
    (tmp_path / "info.json").write_text("{}")
    with pytest.raises(InputError, match="is not bergson's"):
        read_gradient_file(tmp_path)


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_refuses_code_and_other_things(tmp_path, capsys):
    torch.save({"a": Evil()}, tmp_path / "all_orig.pt", pickle_module=pickle)
    with pytest.raises(InputError, match="cannot be read"):
        read_gradient_file(tmp_path)
    assert "code ran" not in capsys.readouterr().out
    torch.save(torch.zeros(3), tmp_path / "all_orig.pt")
    with pytest.raises(InputError, match=r"holds torch.float32 \[3\], not a matrix"):
        read_gradient_file(tmp_path / "all_orig.pt")
    (tmp_path / "empty").mkdir()
    torch.save(torch.zeros(3, 2), tmp_path / "empty" / "grads-160.pt")
    with pytest.raises(InputError, match="is a shard, which LESS merges"):
        read_gradient_file(tmp_path / "empty")
