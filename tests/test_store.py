"""FeatureStore: what is kept comes back, and nothing else does."""

import json
import os

import numpy as np
import pytest

from fastsel.errors import InputError
from fastsel.store import FeatureStore

WHAT = {"feature": "losses", "model": {"name": "m", "fingerprint": "f0"}, "max_length": 512}
RECORDS = np.array([(1.5, 3), (float("nan"), 0)], dtype=[("nll", "<f8"), ("n", "<i4")])


def filled(folder):
    with FeatureStore(folder, WHAT) as store:
        store.set_plan([[0, 2, 30], [2, 4, 20]])
        store.write(0, 2, "content a", RECORDS)
    return store


def test_what_is_written_comes_back_in_another_process(tmp_path):
    filled(tmp_path / "features")
    store = FeatureStore(tmp_path / "features", WHAT)
    assert store.plan == [[0, 2, 30], [2, 4, 20]]
    assert store.has(0, 2, "content a") and not store.has(2, 4, "content b")
    assert store.read(0, 2).tobytes() == RECORDS.tobytes()
    assert isinstance(store.read(0, 2), np.memmap)


def test_the_same_writes_give_the_same_bytes(tmp_path):
    for folder, order in (("a", ((0, 2), (2, 4))), ("b", ((2, 4), (0, 2)))):
        store = FeatureStore(tmp_path / folder, WHAT)
        for start, stop in order:
            store.write(start, stop, f"content {start}", RECORDS)
        store.close()
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["00000000-00000002.npy", "00000002-00000004.npy", "index.json", "lock"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_half_a_shard_is_not_there(tmp_path):
    filled(tmp_path)
    (tmp_path / "00000002-00000004.npy.part").write_bytes(b"half")
    (tmp_path / "00000002-00000004.npy").write_bytes(b"renamed, but not in the index yet")
    store = FeatureStore(tmp_path, WHAT)
    assert not store.has(2, 4, "content b")
    store.write(2, 4, "content b", RECORDS)
    assert store.read(2, 4).tobytes() == RECORDS.tobytes()


def test_refuses_another_computation_with_the_difference(tmp_path):
    filled(tmp_path)
    other = {**WHAT, "max_length": 256, "model": {"name": "m", "fingerprint": "f1"}, "seed": 1}
    with pytest.raises(InputError) as refused:
        FeatureStore(tmp_path, other)
    lines = str(refused.value).splitlines()
    assert lines[0].endswith("holds features of another computation:")
    assert lines[1:-1] == [
        '  model: {"name": "m", "fingerprint": "f0"} there, {"name": "m", "fingerprint": "f1"} now',
        "  max_length: 512 there, 256 now",
        "  seed: null there, 1 now",
    ]


def test_refuses_rows_whose_content_changed(tmp_path):
    store = filled(tmp_path)
    with pytest.raises(InputError, match="rows 0..2 are kept for content content a, now it is content z"):
        store.has(0, 2, "content z")


def test_refuses_a_damaged_or_missing_shard(tmp_path):
    store = filled(tmp_path)
    path = tmp_path / "00000000-00000002.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="is damaged: its xxh3 is"):
        store.read(0, 2)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        store.read(0, 2)


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"schema_version": 1})])
def test_refuses_an_unreadable_index(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(InputError, match="index.json cannot be read"):
        FeatureStore(tmp_path, WHAT)


def test_refuses_another_schema(tmp_path):
    filled(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "schema_version": 2}))
    with pytest.raises(InputError, match="has schema_version 2, this fastsel 1"):
        FeatureStore(tmp_path, WHAT)


def test_refuses_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write features to"):
        FeatureStore(tmp_path / "file" / "features", WHAT)


def test_refuses_a_second_user_and_says_who_is_there(tmp_path):
    with (
        FeatureStore(tmp_path, WHAT),
        pytest.raises(InputError, match=rf"{tmp_path} is in use by process {os.getpid()} "),
    ):
        FeatureStore(tmp_path, WHAT)
    with pytest.raises(InputError, match="another computation"):
        FeatureStore(tmp_path, {**WHAT, "max_length": 1})
    FeatureStore(tmp_path, WHAT).close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_finished_store_can_be_read_where_nobody_can_write(tmp_path):
    filled(tmp_path)
    (tmp_path / "lock").unlink()
    tmp_path.chmod(0o500)
    assert FeatureStore(tmp_path, WHAT).read(0, 2).tobytes() == RECORDS.tobytes()
    tmp_path.chmod(0o700)
