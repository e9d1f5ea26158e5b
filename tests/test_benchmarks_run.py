"""Each benchmark from end to end on tiny shapes: what it writes, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp8
from benchmarks import (
    _clocks,
    _dense_stack,
    _device,
    _graphs,
    _mlp,
    _report,
    accuracy,
    layer,
    reload,
    shapes,
    stack,
)
from benchmarks.__main__ import main


def read(folder, name):
    (path,) = folder.glob("*.json")
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
    monkeypatch.setattr(_device, "problem", lambda: "no GPU")
    monkeypatch.setattr(_clocks, "WALL_READING_SECONDS", 0.001)
    monkeypatch.setattr(reload.jax, "default_backend", lambda: "cpu")


def test_inputs_end_to_end(tmp_path, capsys, on_cpu):
    assert main(["inputs", "--rounds", "1", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path, "inputs")["rows"]
    assert [row["m"] for row in rows] == [1, 5, 1, 5]
    assert all(row["error"] == 0 for row in rows if not row["chained"])
    assert all(0 < row["error"] < 0.1 for row in rows if row["chained"])
    assert "once for all" in capsys.readouterr().out


def test_a_reload_from_the_host_end_to_end(tmp_path, capsys, on_cpu):
    assert main(["reload", "--host", "--rounds", "2", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path, "reload-host")["rows"]
    cases = [(row["layout"], row["memory"]) for row in rows]
    assert [case for case in cases if case[1] == "numpy"] == [
        ("in_out", "numpy"),
        ("out_in", "numpy"),
    ]
    peers = {"host_copy", "device_put_one_by_one", "device_put_by_layer"}
    for row in rows:
        assert set(row["gigabytes_a_second"]) == peers | {"reload_params", "put", "put_tree"}
        assert min(row["gigabytes_a_second"].values()) > 0


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
    options = ["--rows", "5", "--rounds", "3", "--out", str(tmp_path), "--peers"]
    assert main(["layer", *options]) == 0
    assert "They are no GPU numbers" in capsys.readouterr().out or jax.default_backend() != "cpu"
    unaligned, aligned = read(tmp_path, "layer")["rows"]
    for row in (unaligned, aligned):
        # e4m3 rounds: not equal to bfloat16, but near; the scanned stack is the same stack.
        assert 0.01 < row["errors"]["fp8"] < 0.1
        assert np.isfinite(row["errors"]["flax"])
        assert row["errors"]["scanned"] == pytest.approx(row["errors"]["fp8"], abs=0.01)
        # Another scale for h: about the same error, but not the same bits.
        assert 0.01 < row["errors"]["static"] < 0.1
        assert row["errors"]["static"] != row["errors"]["fp8"]
        assert set(row["ratios"]["wall"]) == {"bf16", "scanned", "static", "flax"}
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
        _clocks.relative_error(np.float32(apply({"params": params}, x)), expected)
        for params in (fp8, exchanged, doubled)
    )
    assert right < layer.ERROR_LIMIT < 0.3 < min(wrong), (right, wrong)


def test_gemm_between_end_to_end(tmp_path, capsys, on_cpu, monkeypatch):
    monkeypatch.setattr(shapes, "CPU_GEMM_ROWS", (5,))
    assert main(["gemm", "--between", "--rounds", "3", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "They are no GPU numbers" in printed and "no compiled kernels" in printed
    content = read(tmp_path, "gemm-between")
    assert content["summary"] == {} and len(content["shapes"]) == len(shapes.CPU_GEMM_WEIGHTS)
    for row in content["shapes"]:
        assert row["chosen"]["promoted"].startswith("promoted_") and row["between"] == {}


def test_stack_end_to_end(tmp_path, capsys, on_cpu):
    assert main(["stack", "--rows", "5", "--rounds", "3", "--out", str(tmp_path)]) == 0
    assert "They are no GPU numbers" in capsys.readouterr().out or jax.default_backend() != "cpu"
    rows = read(tmp_path, "stack")["rows"]
    assert [row["widths"] for row in rows] == [[32], [20, 44]]
    for row in rows:
        # Four products of 0.04 each.
        assert 0.02 < row["errors"]["fp8"] < 0.15 and row["layers"] == shapes.CPU_STACK_LAYERS
        assert row["errors"]["scanned"] == pytest.approx(row["errors"]["fp8"], rel=1e-3)
        wall = {kind: times["wall"] for kind, times in row["microseconds"].items()}
        assert min(wall.values()) > 0 and row["bf16_over"]["fp8"]["wall"] > 0
        assert set(wall) == {"fp8", "scanned", "bf16", "arguments", "arguments of nn.scan"}
        assert set(row["over_busy"]) == {"wall", "dropped"}
        for ratios in row["over_busy"].values():
            assert ratios == dict.fromkeys(stack.KINDS)  # no trace, no busy time
        assert row["microseconds"]["fp8"]["dropped"] > 0
        assert row["graphs"]["fp8"] == {"share": None, "marks": None, "in_program": 0}


def test_a_stack_of_wrong_weights_is_told_from_rounding():
    widths = _dense_stack.widths((20, 44), 4)
    assert widths == (20, 44, 20, 44, 20)
    dense = _dense_stack.dense_params(widths)
    fp8 = _mlp.fp8_layers(dense)
    x = jax.random.normal(jax.random.key(2), (5, 20), jnp.bfloat16)
    apply = jax.jit(_dense_stack.DenseStack(widths, "fp8").apply)
    expected = np.float32(_dense_stack.DenseStack(widths, "bf16").apply({"params": dense}, x))
    exchanged = {**fp8, "dense_0": fp8["dense_2"], "dense_2": fp8["dense_0"]}
    right, wrong = (
        _clocks.relative_error(np.float32(apply({"params": params}, x)), expected)
        for params in (fp8, exchanged)
    )
    assert right < stack.ERROR_LIMIT < 1 < wrong


def test_flags_reach_a_child_of_their_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
    known = {"known": "--xla_gpu_graph_min_graph_size=1"}
    monkeypatch.setattr(_graphs, "SETTINGS", {**known, "unknown": "--xla_no_such_flag=1"})
    options = ["--graphs", "--rows", "2", "--rounds", "1", "--out", str(tmp_path)]
    assert main(["stack", *options]) == 1
    printed = capsys.readouterr()
    assert "They are no GPU numbers" in printed.out
    assert "XLA_FLAGS='--xla_no_such_flag=1' failed" in printed.err
    settings = read(tmp_path, "stack-graphs")["settings"]
    assert settings["unknown"]["rows"] is None
    assert settings["known"]["flags"] == known["known"]
    assert [row["m"] for row in settings["known"]["rows"]] == [2, 2]


def test_accuracy_end_to_end(tmp_path, capsys, on_cpu):
    assert main(["accuracy", "--k", "512", "--out", str(tmp_path)]) == 0
    assert "They are no GPU numbers" in capsys.readouterr().out or jax.default_backend() != "cpu"
    assert (tmp_path / "accuracy-cpu.png").exists()
    rows = {row["inputs"]: row["errors"] for row in read(tmp_path, "accuracy")["rows"]}
    assert set(rows) == {"independent", "coherent", "outliers"}
    for errors in rows.values():
        assert set(errors) == {
            *(f"ours {sums}, {by}" for sums in ("fast", "promoted") for by in ("scaled", "tensor")),
            "bf16",
        }
        # Without a tensor core sums are float32's, and what is left is bfloat16's rounding.
        assert all(1e-3 < e["sums"] < 2.5e-3 for e in errors.values())
        assert errors["bf16"]["error"] < 4e-3 < errors["ours promoted, scaled"]["error"] < 0.05
    # One scale for all rows is set by the outlier, and the other rows fall under its steps.
    outliers = rows["outliers"]
    assert outliers["ours promoted, scaled"]["worst_row"] < 0.08
    assert outliers["ours promoted, tensor"]["worst_row"] > 0.12


def test_errors_are_relative_and_of_the_worst_row():
    exact = np.array([[3.0, 4.0], [0.3, 0.4]])
    result = exact + np.array([[0.0, 0.0], [0.3, 0.4]])
    found = accuracy.errors(result, exact, result)
    assert found["error"] == pytest.approx(0.5 / np.sqrt(25.25))
    assert (found["sums"], found["worst_row"]) == (0.0, pytest.approx(1.0))
    row = accuracy.measure("independent", 16, 64)
    assert accuracy.is_right(row)
    row["errors"]["ours promoted, scaled"]["sums"] = 0.02
    assert not accuracy.is_right(row)
    assert not accuracy.is_right(row | {"faults": {"ours fast, scaled": "launch failed"}})


def test_the_peer_gets_the_same_bits():
    def peer(x, w, x_scale, w_scale, *, fast):
        if not fast and x_scale.ndim:
            raise RuntimeError("no such kernel\nat a place")
        return np.float32(x) * x_scale @ (np.float32(w) * np.reshape(w_scale, (-1, 1))).T

    row = accuracy.measure("outliers", 16, 512, peer)
    assert row["faults"] == {"torch promoted, scaled": "no such kernel"}
    assert all(row["errors"][f"torch fast, {by}"]["sums"] < 1e-6 for by in ("scaled", "tensor"))


def test_the_tree_is_llama_3_8b():
    sizes = shapes.llama_sizes()
    assert len(sizes) == 32 * 7 + 1
    assert sum(k * n for k, n in sizes.values()) == 7_504_658_432
    # A read is 2 bytes, the write 1, and a float32 scale for each output feature.
    outputs = sum(n for _, n in sizes.values())
    moved = [reload.bytes_moved(sizes, reads) - 4 * outputs for reads in (1, 2)]
    assert moved == [3 * 7_504_658_432, 5 * 7_504_658_432]


def test_reload_end_to_end(tmp_path, capsys, on_cpu, monkeypatch):
    monkeypatch.setitem(reload.SMALL, "layers", 1)
    assert main(["reload", "--scale", "small", "--rounds", "2", "--out", str(tmp_path)]) == 0
    assert "They are no GPU numbers" in capsys.readouterr().out
    content = read(tmp_path, "reload")
    assert content["weights"] == sum(k * n for k, n in shapes.llama_sizes(1, 64).values())
    for row, (layout, allowed) in zip(content["rows"], reload.CASES, strict=True):
        assert row["allow_nonfinite"] == allowed
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
