"""Files of a checkpoint: every dtype, mapped and not copied, by path, directory and index."""

from __future__ import annotations

import mmap

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import BF16, E4M3, TYPES, bits, entries, join, write, write_sharded
from safetensors.numpy import save_file

from jaxfp8.checkpoint import load_safetensors
from jaxfp8.checkpoint._files import open_files
from jaxfp8.checkpoint._header import read_header


def owner(array: np.ndarray) -> object:
    """What the memory of an array belongs to."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base.obj if isinstance(base, memoryview) else base


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (1, 1, 7)], ids=str)
def test_every_dtype_and_shape_comes_back_to_the_bit(dtype, shape, tmp_path):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(TYPES[dtype])
    file = write(tmp_path / "model.safetensors", {"a.b": array, "c": np.ones(3, np.float32)})
    tensor = open_files(file).tensors["a.b"]
    assert (tensor.array.dtype, tensor.array.shape) == (array.dtype, shape)
    assert bits(tensor.array) == bits(array)
    assert (tensor.name, tensor.file) == ("a.b", file)


def test_nothing_is_read_but_headers(tmp_path):
    file = write(tmp_path / "model.safetensors", {"kernel.weight": np.ones((64, 32), BF16)})
    value = load_safetensors(file)["kernel"]["kernel"].value
    assert isinstance(owner(value), mmap.mmap) and not value.flags.writeable
    # Changed afterwards, and seen: it is the file.
    content = bytearray(file.read_bytes())
    content[-2:] = np.array(3, BF16).tobytes()
    with file.open("r+b") as opened:
        opened.write(content)
    assert float(value[-1, -1]) == 3


@pytest.mark.parametrize("shift", range(5))
def test_data_at_any_alignment(shift, tmp_path):
    array = np.linspace(-1, 1, 21, dtype=np.float32).reshape(3, 7)
    header, _ = entries({"a": array})
    assert (shift + len(join(header, b""))) % 4 or shift
    file = write(tmp_path / "model.safetensors", {"a": array}, shift=shift)
    loaded = load_safetensors(file)["a"]
    np.testing.assert_array_equal(np.asarray(jnp.asarray(loaded)), array)
    np.testing.assert_array_equal(np.asarray(jax.device_put(loaded)), array)


def test_what_the_library_writes(tmp_path):
    # It sorts by size of dtype, and pads its header.
    tensors = {"a": np.ones((2, 3), E4M3), "b": np.arange(5), "c": np.full(3, 2, BF16)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    files = open_files(tmp_path / "a.safetensors")
    assert files.metadata == {"format": "pt"}
    for name, array in tensors.items():
        assert bits(files.tensors[name].array) == bits(array)


def test_a_directory_an_index_and_files_without_one(tmp_path):
    first, second = {"a": np.ones(2, np.float32)}, {"b": np.zeros(3, np.float32)}
    folder = write_sharded(tmp_path / "indexed", {"x.safetensors": first, "y.safetensors": second})
    write(folder / "consolidated.safetensors", {"not in the index": np.ones(1, np.float32)})
    for path in (folder, str(folder), folder / "model.safetensors.index.json"):
        assert load_safetensors(path).keys() == {"a", "b"}
    assert load_safetensors(folder / "y.safetensors").keys() == {"b"}
    for name, tensors in {"x": first, "y": second}.items():
        write(tmp_path / "plain" / f"{name}.safetensors", tensors)
    assert load_safetensors(tmp_path / "plain").keys() == {"a", "b"}


def test_a_link_to_a_file_elsewhere_is_followed(tmp_path):
    # As a download cache keeps them.
    blob = write(tmp_path / "blobs" / "0123", {"a": np.ones(2, np.float32)})
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(blob)
    np.testing.assert_array_equal(load_safetensors(folder)["a"], np.ones(2))


@hypothesis.given(
    place=st.integers(0, 200), byte=st.integers(0, 255), cut=st.none() | st.integers(0, 250)
)
@hypothesis.settings(max_examples=300)
def test_a_damaged_header_is_refused_or_describes_the_same_file(place, byte, cut, tmp_path_factory):
    # Whatever byte is wrong: a ValueError, or tensors that lie within the file, each byte once.
    file = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    header, data = entries({"a.weight": np.ones((3, 5), BF16), "b": np.ones(4, np.float32)})
    content = bytearray(join(header, data))
    content[place % len(content)] = byte
    file.write_bytes(content[:cut])
    try:
        stored, _ = read_header(file)
    except ValueError as error:
        assert str(file) in str(error)
        return
    start = 8 + int.from_bytes(content[:8], "little")
    ends = sorted((tensor.start, tensor.stop) for tensor in stored.values())
    covered = [start, *(end for pair in ends for end in pair), file.stat().st_size]
    assert covered[::2] == covered[1::2]
    for tensor in open_files(file).tensors.values():
        np.array(tensor.array)
