"""A machine where CUTLASS cannot run: what is missing, how to get it, and when that is said."""

import ctypes
import functools
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import cuda_text, randn

from jaxfp8 import PaddedKernel, _cutlass, _dispatch, fp8_dense, quantize_input, scaled_matmul
from jaxfp8.dense_float import fp8_dense_float


K, N = 33, 50
X, W = randn(0, (4, K)), randn(1, (K, N))
KERNEL = PaddedKernel.from_dense(W)
CPU = jax.devices("cpu")[0]
cutlass_dense = functools.partial(fp8_dense, implementation="cutlass")


def look_again() -> _cutlass.Plugin:
    """`plugin()` without its cache."""
    return _cutlass.plugin.__wrapped__()


@pytest.mark.parametrize(
    "f",
    [
        lambda x: cutlass_dense(x, KERNEL),
        jax.jit(lambda x: cutlass_dense(x, KERNEL)),
        jax.vmap(lambda x: cutlass_dense(x, KERNEL)),
        jax.grad(lambda x: cutlass_dense(x, KERNEL).sum()),
        lambda x: fp8_dense_float(x, W, implementation="cutlass"),
        lambda x: scaled_matmul(
            jnp.ones((4, 16), jnp.float8_e4m3fn),
            jnp.ones((16, 16), jnp.float8_e4m3fn),
            1.0,
            1.0,
            implementation="cutlass",
        ),
        lambda x: quantize_input(x, implementation="cutlass"),
        lambda x: cutlass_dense(x, KERNEL, out_scale=0.1),
    ],
    ids=["eager", "jit", "vmap", "grad", "float", "scaled_matmul", "quantize", "out_scale"],
)
def test_cutlass_named_and_run_on_a_cpu(f):
    with jax.default_device(CPU), pytest.raises(RuntimeError) as caught:
        f(jax.device_put(X, CPU))
    message = str(caught.value)
    assert '`implementation="cutlass"` was asked for, but this program is for cpu' in message
    assert "`implementation=None` takes CUTLASS where it can run" in message
    if not _cutlass.cuda_devices():
        assert "no CUDA device is visible to JAX" in message
        assert "Hopper GPU (compute capability 9.0)" in message and "pip install jax" in message


def test_tracing_and_lowering_for_cuda_ask_for_nothing():
    jax.eval_shape(cutlass_dense, X, KERNEL)
    jax.make_jaxpr(cutlass_dense)(X, KERNEL)
    assert "@jaxfp8_dense_v1" in cuda_text(cutlass_dense, X, KERNEL)
    quantize = functools.partial(quantize_input, implementation="cutlass")
    assert "@jaxfp8_quantize_v1" in cuda_text(quantize, X)


def test_no_rows_need_no_gpu():
    assert cutlass_dense(X[:0], KERNEL).shape == (0, N)
    assert quantize_input(X[:0], implementation="cutlass").shape == (0, K)


class FakeGpu:
    """A CUDA device as `jax.devices` gives it."""

    def __init__(self, capability):
        self.compute_capability = capability
        self.device_kind = {"9.0": "NVIDIA H100", "8.0": "NVIDIA A100"}[capability]

    def __str__(self):
        return "cuda:0"


@pytest.fixture
def with_gpus(monkeypatch):
    """A function that pretends. JAX keeps what it traced and lowered, so that is forgotten."""

    def pretend(*capabilities, plugin_problem=None):
        gpus = tuple(map(FakeGpu, capabilities))
        plugin = _cutlass.Plugin("library.so", {}, plugin_problem)
        monkeypatch.setattr(_cutlass, "cuda_devices", lambda: gpus)
        monkeypatch.setattr(_cutlass, "plugin", lambda: plugin)

    jax.clear_caches()
    yield pretend
    jax.clear_caches()


def test_a_gpu_that_is_no_hopper_takes_xla_and_says_why(with_gpus):
    with_gpus("9.0", "8.0")
    name, reason = _dispatch.choose(None)
    assert name == "xla"
    assert "compute capability 8.0" in reason and "9.0 (Hopper" in reason
    assert "CUDA_VISIBLE_DEVICES" in reason
    with pytest.raises(RuntimeError, match=r'"cutlass"` cannot run here: .*capability 8\.0'):
        cuda_text(cutlass_dense, X, KERNEL)


def test_a_hopper_gpu_without_the_plugin_takes_xla_and_says_why(with_gpus):
    with_gpus("9.0", plugin_problem="the plugin `jaxfp8-cuda13` is not installed.")
    assert _dispatch.choose(None) == ("xla", "the plugin `jaxfp8-cuda13` is not installed.")
    with pytest.raises(RuntimeError, match=r"cannot run here: the plugin `jaxfp8-cuda13` is not"):
        cuda_text(cutlass_dense, X, KERNEL)
    # Unnamed, the program is an XLA one, also where it is lowered for CUDA.
    assert "custom_call @jaxfp8" not in cuda_text(fp8_dense, X, KERNEL)


def test_a_hopper_gpu_with_the_plugin_takes_cutlass(with_gpus):
    with_gpus("9.0", "9.0")
    assert _dispatch.choose(None)[0] == "cutlass"
    assert _dispatch.choose("xla")[0] == "xla"
    assert "@jaxfp8_dense_v1" in cuda_text(fp8_dense, X, KERNEL)


def test_the_plugin_is_not_installed(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.delenv("JAXFP8_LIBRARY", raising=False)
    monkeypatch.setattr(importlib, "import_module", missing)
    found = look_again()
    assert found.path is None and found.build == {}
    assert "`jaxfp8-cuda13` is not installed" in found.problem
    assert _cutlass.HOW_TO_INSTALL in found.problem and "make cuda" in found.problem


def test_the_plugin_has_lost_its_library(monkeypatch):
    class Package:
        @staticmethod
        def library_path():
            raise FileNotFoundError("its library is not there.")

    monkeypatch.delenv("JAXFP8_LIBRARY", raising=False)
    monkeypatch.setattr(importlib, "import_module", lambda name: Package)
    assert "has lost its library: its library is not there." in look_again().problem


def test_a_library_that_is_none(monkeypatch, tmp_path):
    nonsense = tmp_path / "nonsense.so"
    nonsense.write_bytes(b"not an ELF file")
    for path in (tmp_path / "absent.so", nonsense):
        monkeypatch.setenv("JAXFP8_LIBRARY", str(path))
        found = look_again()
        assert found.path == str(path)
        assert f"the library {path} cannot be opened" in found.problem
        assert "make cuda" in found.problem


def test_a_library_of_something_else(monkeypatch):
    monkeypatch.setenv("JAXFP8_LIBRARY", "libc.so.6")
    problem = look_again().problem
    assert "libc.so.6 cannot be opened" in problem and "jaxfp8_build_info" in problem


def test_a_plugin_built_for_a_newer_ffi(monkeypatch):
    class Library:
        class jaxfp8_build_info:  # noqa: N801, the name of the C function
            restype = None

            def __new__(cls):
                return json.dumps({"ffi": [0, 99], "kernels": []}).encode()

    monkeypatch.setenv("JAXFP8_LIBRARY", "newer.so")
    monkeypatch.setattr(ctypes, "CDLL", lambda path: Library)
    found = look_again()
    major, minor = _cutlass.jaxlib_ffi_version()
    assert found.build["ffi"] == [0, 99]
    assert "was built for XLA FFI 0.99" in found.problem
    assert f"the installed jaxlib has {major}.{minor}" in found.problem
    assert "upgrade jaxlib, or rebuild" in found.problem


@pytest.mark.parametrize(
    ("built", "installed", "fits"),
    [
        ([0, 3], (0, 3), True),
        ([0, 3], (0, 4), True),
        ([0, 4], (0, 3), False),
        ([1, 0], (0, 3), False),
        ([0, 9], (1, 9), False),
    ],
)
def test_which_ffi_versions_fit(built, installed, fits):
    problem = _cutlass.check_ffi_version(built, installed)
    assert (problem is None) is fits


def test_the_installed_jaxlib_says_its_ffi_version():
    major, minor = _cutlass.jaxlib_ffi_version()
    assert (major, minor) >= (0, 3)


@pytest.mark.gpu
def test_this_gpu_takes_cutlass():
    """Every GPU test rests on it: plugin and GPU are usable, and chosen without being named."""
    assert _cutlass.problem() is None
    assert _dispatch.choose(None)[0] == "cutlass"
    text = jax.jit(fp8_dense).lower(X, KERNEL).compile().as_text()
    assert text.count('custom_call_target="jaxfp8_dense_v1"') == 1
    np.testing.assert_array_equal(
        np.asarray(fp8_dense(X, KERNEL)), np.asarray(cutlass_dense(X, KERNEL))
    )
