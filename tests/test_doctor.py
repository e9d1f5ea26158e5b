"""The report names what is there and why, and the self-test fails when the layer is wrong."""

import ctypes
import functools
import importlib
import json
import runpy
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp8 import _cutlass
from jaxfp8.matmul import fp8_dense


# The function of the same name may hide the module on the package.
module = importlib.import_module("jaxfp8.doctor")
BUILD = {
    "calls": _cutlass.CALLS,
    "ffi": [0, 3],
    "cuda": 13000,
    "cutlass": "4.2.0",
    "kernels": ["a", "b"],
}


def search_anew(monkeypatch):
    """The plugin is looked for again, and what is found is forgotten with the test."""
    monkeypatch.setattr(_cutlass, "plugin", functools.cache(_cutlass.plugin.__wrapped__))


@pytest.fixture
def no_plugin(monkeypatch):
    search_anew(monkeypatch)
    monkeypatch.delenv("JAXFP8_LIBRARY", raising=False)
    monkeypatch.setitem(sys.modules, "jaxfp8_cuda13", None)


def see_gpu(monkeypatch, capability, *, default):
    """Let JAX see one GPU; the computations themselves stay on the CPU."""

    class Gpu:
        platform = "gpu"
        device_kind = "NVIDIA Test GPU"
        compute_capability = capability

        def __str__(self):
            return "cuda:0"

    gpu, cpus = Gpu(), jax.devices("cpu")
    monkeypatch.setattr(_cutlass, "cuda_devices", lambda: (gpu,))
    monkeypatch.setattr(module.jax, "devices", lambda *_: [gpu] if default else cpus)


def run_main():
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("jaxfp8", run_name="__main__")
    return stop.value.code


def test_the_report_of_this_machine(no_plugin):
    report = module.doctor()
    assert report.versions["jax"] == jax.__version__
    assert report.ffi >= (0, 3)
    assert report.plugin.path is None
    assert report.self_test.passed and 0 < report.self_test.error <= 1
    assert 0 < report.self_test.milliseconds < 1000
    text = str(report)
    assert f"jax {jax.__version__}" in text and "`jaxfp8-cuda13` is not installed" in text
    assert "Build and install it with `make cuda`" in " ".join(text.split())
    assert len(text.splitlines()) <= 24 and max(map(len, text.splitlines())) <= 100


def test_without_a_gpu_it_is_xla_and_says_why(monkeypatch, no_plugin):
    monkeypatch.setattr(_cutlass, "cuda_devices", tuple)
    name, reason = module._implementation_here()
    assert name == "xla"
    assert "no CUDA device is visible" in reason and "compute capability 9.0" in reason


def test_the_default_device_decides_not_the_visible_one(monkeypatch, no_plugin):
    see_gpu(monkeypatch, "9.0", default=False)
    assert module._implementation_here()[0] == "xla"
    assert "default device" in module._implementation_here()[1]


def test_another_gpu_is_named_with_its_capability(monkeypatch, no_plugin):
    see_gpu(monkeypatch, "8.0", default=True)
    name, reason = module._implementation_here()
    assert name == "xla"
    assert "compute capability 8.0" in reason and "9.0" in reason
    assert module._describe_device(_cutlass.cuda_devices()[0]) == (
        "cuda:0: NVIDIA Test GPU, compute capability 8.0"
    )


def test_a_hopper_gpu_without_the_plugin_says_what_to_install(monkeypatch, no_plugin):
    see_gpu(monkeypatch, "9.0", default=True)
    name, reason = module._implementation_here()
    assert name == "xla"
    assert "`jaxfp8-cuda13` is not installed" in reason


def fake_library(monkeypatch, build, registered):
    """A library at a path of ours, which says it was built as `build` says."""
    search_anew(monkeypatch)
    monkeypatch.setenv("JAXFP8_LIBRARY", "/somewhere/libjaxfp8_cuda13.so")

    class Library(types.SimpleNamespace):
        def __getattr__(self, name):
            return ctypes.cast(0, ctypes.c_void_p)

    def info():
        return json.dumps(build).encode()

    monkeypatch.setattr(_cutlass.ctypes, "CDLL", lambda _: Library(jaxfp8_build_info=info))
    monkeypatch.setattr(_cutlass.jax.ffi, "pycapsule", lambda pointer: pointer)
    monkeypatch.setattr(
        _cutlass.jax.ffi, "register_ffi_target", lambda name, *_, **__: registered.append(name)
    )


def test_a_plugin_for_a_newer_ffi_is_named_and_not_registered(monkeypatch):
    registered = []
    fake_library(monkeypatch, {**BUILD, "ffi": [0, 99]}, registered)
    see_gpu(monkeypatch, "9.0", default=True)
    name, reason = module._implementation_here()
    assert (name, registered) == ("xla", [])
    assert "XLA FFI 0.99" in reason and "upgrade jaxlib" in reason
    lines = module._plugin_lines(_cutlass.plugin(), (0, 3))
    assert lines[0] == "found at /somewhere/libjaxfp8_cuda13.so"
    assert "XLA FFI 0.99 (jaxlib here: 0.3)" in lines[1]
    assert lines[2] == reason


def test_a_plugin_that_refuses_our_calls_is_named_and_not_registered(monkeypatch):
    registered = []
    fake_library(monkeypatch, {**BUILD, "calls": _cutlass.CALLS - 1}, registered)
    see_gpu(monkeypatch, "9.0", default=True)
    name, reason = module._implementation_here()
    assert (name, registered) == ("xla", [])
    assert "libjaxfp8_cuda13.so is older than this jaxfp8" in reason and "`make cuda`" in reason


def test_a_plugin_that_fits_is_registered_and_described(monkeypatch):
    registered = []
    fake_library(monkeypatch, BUILD, registered)
    see_gpu(monkeypatch, "9.0", default=True)
    assert module._implementation_here()[0] == "cutlass"
    assert registered == list(_cutlass.TARGETS)
    lines = module._plugin_lines(_cutlass.plugin(), (0, 4))
    assert lines[1:] == [
        "built with CUDA 13.0, XLA FFI 0.3 (jaxlib here: 0.4), 2 kernels, cutlass 4.2.0",
        "its kernels can be called",
    ]


def test_python_dash_m_prints_the_report_and_exits_with_0(capsys):
    assert run_main() == 0
    printed = capsys.readouterr().out
    assert "passed: " in printed and "PaddedFP8Dense takes here" in printed


def no_bias(x, kernel, bias, **options):
    return fp8_dense(x, kernel, None, **options)


def no_activation(x, kernel, bias, **options):
    return fp8_dense(x, kernel, bias)


def scale_of_the_next_channel(x, kernel, bias, **options):
    scale = jnp.roll(kernel.scale[: module.N], 1)
    scale = kernel.scale.at[: module.N].set(scale)
    kernel = type(kernel)(kernel.qvalue, scale, kernel.in_features, kernel.out_features)
    return fp8_dense(x, kernel, bias, **options)


def rounded_twice(x, kernel, bias, **options):
    y = fp8_dense(x, kernel, None, out_dtype=jnp.bfloat16) + bias.astype(jnp.bfloat16)
    return jax.nn.gelu(y, approximate=True)


def one_nan(x, kernel, bias, **options):
    return fp8_dense(x, kernel, bias, **options).at[-1, -1].set(jnp.nan)


def nearest_other_code(x, kernel, bias, **options):
    codes = jax.lax.bitcast_convert_type(kernel.qvalue, jnp.uint8)
    largest = jnp.argmax(jnp.where(codes[5] & 0x80, 0, codes[5]))
    codes = codes.at[5, largest].add(-1)  # magnitudes are ordered as their codes are
    qvalue = jax.lax.bitcast_convert_type(codes, kernel.qvalue.dtype)
    kernel = type(kernel)(qvalue, kernel.scale, kernel.in_features, kernel.out_features)
    return fp8_dense(x, kernel, bias, **options)


@pytest.mark.parametrize(
    "broken",
    [
        no_bias,
        no_activation,
        scale_of_the_next_channel,
        rounded_twice,
        one_nan,
        nearest_other_code,
        lambda *_, **__: jnp.zeros((module.M, module.N + 2)),
    ],
)
def test_a_wrong_layer_fails_the_self_test_and_exits_with_1(broken, monkeypatch, capsys):
    monkeypatch.setattr(module, "fp8_dense", broken)
    report = module.doctor()
    assert not report.self_test.passed
    assert report.self_test.error > 1
    assert run_main() == 1
    assert "FAILED: " in capsys.readouterr().out


def test_an_error_of_the_layer_is_in_the_report(monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(module, "fp8_dense", fails)
    assert run_main() == 1
    assert "FAILED: RuntimeError: no kernel image is available" in capsys.readouterr().out


def test_the_reference_agrees_with_dequantized_operands():
    # The self-test's own reference, against the package's in another precision and order.
    rng = np.random.default_rng(3)
    w = rng.normal(size=(module.K, module.N)).astype(np.float32)
    kernel = module.PaddedKernel.from_dense(w)
    ours = module._round_to_fp8(w.T).T
    np.testing.assert_array_equal(np.asarray(kernel.dequantize()), ours.astype(np.float32))


def test_the_command_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "jaxfp8"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Self-test" in done.stdout and "passed: " in done.stdout
