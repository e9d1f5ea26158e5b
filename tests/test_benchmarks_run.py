"""Each benchmark from end to end on tiny shapes: what it writes, and what it refuses."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp8


ROOT = str(Path(__file__).parents[1])
if ROOT not in sys.path:  # the benchmarks are run from a checkout, not installed
    sys.path.append(ROOT)

from benchmarks import _mlp, _report, layer, reload, shapes  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402


def read(folder, name):
    (path,) = folder.iterdir()
    assert path.name == f"{name}-cpu.json"
    content = json.loads(path.read_text())
    assert content["benchmark"] == name and content["is_gpu_number"] is False
    assert content["environment"]["versions"]["jax"] == jax.__version__
    assert len(content["environment"]["source_hash"]) == 64
    return content


@pytest.fixture
def on_cpu(monkeypatch):
    """The benchmarks take this for a machine without a GPU, wherever the tests run."""
    monkeypatch.setattr(_report, "_nvidia_smi", lambda: (None, None))
    monkeypatch.setattr(layer, "problem", lambda: "no GPU")
    monkeypatch.setattr(reload.jax, "default_backend", lambda: "cpu")


def test_gemm_end_to_end(tmp_path, capsys, on_cpu):
    assert main(["gemm", "--shapes", "5x48x32", "--rounds", "3", "--out", str(tmp_path)]) == 0
    assert "They are no GPU numbers" in capsys.readouterr().out
    content = read(tmp_path, "gemm")
    (row,) = content["shapes"]
    assert set(row["microseconds"]) == {"ours", "bf16"} and set(row["ratios"]) == {"bf16"}
    assert content["summary"]["bf16"]["worst"] == row["ratios"]["bf16"] > 0


def test_a_wrong_product_is_not_timed(tmp_path, capsys, on_cpu, monkeypatch):
    right = jaxfp8.scaled_matmul
    monkeypatch.setattr(jaxfp8, "scaled_matmul", lambda *args: 1.02 * right(*args))
    assert main(["gemm", "--shapes", "5x48x32", "--rounds", "3", "--out", str(tmp_path)]) == 1
    (row,) = read(tmp_path, "gemm")["shapes"]
    assert row["microseconds"] == {} and "relative error 2." in row["faults"]["ours"]
    assert "WRONG" in capsys.readouterr().out


def test_layer_end_to_end(tmp_path, capsys, on_cpu, monkeypatch):
    monkeypatch.setattr(shapes, "CPU_LAYER_GROUPS", (((20, 44), (20, 48)),))
    monkeypatch.setattr(layer, "WALL_READING_SECONDS", 0.001)
    options = ["--rows", "5", "--rounds", "3", "--out", str(tmp_path), "--peers"]
    assert main(["layer", *options]) == 0
    assert "They are no GPU numbers" in capsys.readouterr().out or jax.default_backend() != "cpu"
    unaligned, aligned = read(tmp_path, "layer")["rows"]
    for row in (unaligned, aligned):
        # e4m3 rounds: not equal to bfloat16, but near; the scanned stack is the same stack.
        assert 0.01 < row["errors"]["fp8"] < 0.1
        assert np.isfinite(row["errors"]["flax"])
        assert row["errors"]["scanned"] == pytest.approx(row["errors"]["fp8"], abs=0.01)
        assert set(row["ratios"]["wall"]) == {"bf16", "scanned", "flax"}
        assert row["microseconds"]["wall"]["fp8"] > 0 and row["layers"] == 3
    assert unaligned["to_the_last_of_the_group"]["wall"]["fp8"] > 0
    assert aligned["to_the_last_of_the_group"]["wall"] == {}


def test_wrong_weights_are_told_from_the_rounding_of_fp8():
    x = jax.random.normal(jax.random.key(2), (5, 20), jnp.bfloat16)
    dense = _mlp.dense_params(20, 44, 2)
    fp8 = _mlp.fp8_params(dense)
    exchanged = {"block_0": fp8["block_1"], "block_1": fp8["block_0"]}
    up = fp8["block_1"]["up"]["kernel"]
    doubled = jaxfp8.PaddedKernel(up.qvalue, 2 * up.scale, up.in_features, up.out_features)
    doubled = {
        **fp8,
        "block_1": {**fp8["block_1"], "up": {**fp8["block_1"]["up"], "kernel": doubled}},
    }
    apply = jax.jit(_mlp.Stack(20, 44, "fp8", 2).apply)
    expected = np.float32(_mlp.Stack(20, 44, "bf16", 2).apply({"params": dense}, x))
    right, *wrong = (
        layer.relative_error(np.float32(apply({"params": params}, x)), expected)
        for params in (fp8, exchanged, doubled)
    )
    assert right < layer.ERROR_LIMIT < 0.3 < min(wrong), (right, wrong)


def test_reload_end_to_end(tmp_path, capsys, on_cpu, monkeypatch):
    monkeypatch.setitem(reload.SMALL, "layers", 1)
    assert main(["reload", "--scale", "small", "--rounds", "2", "--out", str(tmp_path)]) == 0
    assert "They are no GPU numbers" in capsys.readouterr().out
    content = read(tmp_path, "reload")
    assert content["weights"] == sum(k * n for k, n in shapes.llama_sizes(1, 64).values())
    for row, layout in zip(content["rows"], reload.LAYOUTS, strict=True):
        assert row["layout"] == layout and row["leaves"] == 2 * 8
        assert (row["recompiles"], row["moved_buffers"], row["wrong"]) == (0, 0, [])
        share = row["bytes_moved"] / (row["milliseconds"]["wall"] * 1e-3)
        share /= content["copy_bytes_per_second"]
        assert row["share_of_copy_bandwidth"]["wall"] == pytest.approx(share)


def test_a_weight_that_was_not_reloaded_is_named():
    sizes = {"a": (20, 44), "b": (44, 20)}
    loaded = reload.trainer_tree(sizes, "out_in")
    served = reload.served_tree(sizes)
    assert sorted(reload.wrong_weights(served, loaded, sizes)) == ["a", "b"]
    kernel = jaxfp8.PaddedKernel.from_dense(loaded["a"]["kernel"].value.T)
    served["a"]["kernel"] = kernel
    assert reload.wrong_weights(served, loaded, sizes) == ["b"]


def test_extra_memory_is_the_peak_above_what_was_there(monkeypatch):
    # The peak so far, 150, is of something before; filled up to it, the reload raises it by 30.
    before, filled, after = (
        {"bytes_in_use": used, "peak_bytes_in_use": peak}
        for used, peak in ((100, 150), (150, 150), (150, 180))
    )
    monkeypatch.setattr(reload, "_memory", lambda: before)
    assert reload._fill_to_peak().nbytes == 50
    assert reload._extra_memory(filled, after) == {"extra_bytes_at_peak": 30}
    monkeypatch.setattr(reload, "_memory", lambda: None)
    assert reload._fill_to_peak() is None
    assert reload._extra_memory(None, None) == {"extra_bytes_at_peak": None}
