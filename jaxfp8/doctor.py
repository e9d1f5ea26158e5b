"""`doctor`: what this machine has, which path a layer takes on it, and if that computes right."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import statistics
import textwrap
import time
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfp8 import _cutlass, _dispatch
from jaxfp8.matmul import fp8_dense
from jaxfp8.padded import PaddedKernel
from jaxfp8.quantize import FP8_DTYPE, FP8_MAX


if TYPE_CHECKING:
    from jaxtyping import Float64


# Neither K nor N a multiple of 16, and M one more than a tile: padding and edges are in play.
M, K, N = 33, 100, 30
# One rounding to bfloat16, whose unit roundoff is 2^-8.
OUTPUT_ROUNDING = 2.0**-8
# The tensor core aligns the products of an MMA to the largest and keeps 13 bits behind its leading
# one (DeepSeek-V3 report, 3.3.2). Simulated so on this data, the sums lose up to a quarter of
# 2^-11 of sum |x||w|. One e4m3 code too many exceeds that, a missing bias or a scale of the
# next row by a factor of a hundred.
SUM_ROUNDING = 2.0**-11
# The slope of gelu is at most 1.13, so it may enlarge an error of its argument by that.
GELU_SLOPE = 1.13
CALLS = 20


@dataclasses.dataclass(frozen=True)
class SelfTest:
    """One small layer against a float64 reference.

    Attributes:
        passed: whether every element is within its tolerance.
        error: the largest error, as a share of its element's tolerance. Infinite if the call
            failed or gave a NaN.
        milliseconds: the median of a call, dispatch included, once it is compiled; None if it
            failed.
        message: why it failed, if it raised an error.
    """

    passed: bool
    error: float
    milliseconds: float | None
    message: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What `doctor` found. Its text is one screen.

    Attributes:
        versions: of Python and the packages.
        devices: what JAX sees, one line each.
        plugin: the plugin library; its `problem` is None if its kernels can be called.
        ffi: the XLA FFI version of the installed jaxlib.
        implementation: "cutlass" or "xla", what `PaddedFP8Dense` takes on the default device.
        reason: why.
        self_test: whether that gives right results.
    """

    versions: dict[str, str]
    devices: tuple[str, ...]
    plugin: _cutlass.Plugin
    ffi: tuple[int, int]
    implementation: str
    reason: str
    self_test: SelfTest

    def __str__(self) -> str:
        sections = {
            f"jaxfp8 {self.versions['jaxfp8']}": [
                ", ".join(f"{name} {v}" for name, v in self.versions.items() if name != "jaxfp8")
            ],
            "Devices": list(self.devices),
            "Plugin": _plugin_lines(self.plugin, self.ffi),
            "PaddedFP8Dense takes here": [f"{self.implementation}: {self.reason}"],
            f"Self-test: fp8_dense, x {M}x{K}, kernel {K}x{N}, bias, gelu": [
                _self_test_line(self.self_test)
            ],
        }
        return "\n".join(
            line
            for title, lines in sections.items()
            for line in (title, *(wrapped for text in lines for wrapped in _wrap(text)))
        )


def doctor() -> Report:
    """Look at this machine, and run one small layer on the path that a layer takes here.

    Nothing is raised: what is wrong is in the report. `python -m jaxfp8` prints it, and exits
    with 1 if the self-test fails.
    """
    implementation, reason = _implementation_here()
    return Report(
        versions=_versions(),
        devices=tuple(_describe_device(device) for device in _devices()),
        plugin=_cutlass.plugin(),
        ffi=_cutlass.jaxlib_ffi_version(),
        implementation=implementation,
        reason=reason,
        self_test=_self_test(),
    )


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("jaxfp8", "jax", "jaxlib", "flax", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "(not installed: imported from a checkout)"
    return {"jaxfp8": versions.pop("jaxfp8"), "Python": platform.python_version(), **versions}


def _devices() -> list[jax.Device]:
    """Each CUDA device, and the default one if it is another."""
    devices = list(_cutlass.cuda_devices())
    default = jax.devices()[0]
    return devices if default in devices else [*devices, default]


def _describe_device(device: jax.Device) -> str:
    if device.platform == "cpu":
        return f"{device} ({platform.machine()})"
    capability = getattr(device, "compute_capability", "unknown")
    return f"{device}: {device.device_kind}, compute capability {capability}"


def _implementation_here() -> tuple[str, str]:
    """`_dispatch.choose`, for the default device: it answers for a machine with a GPU."""
    devices = _cutlass.cuda_devices()
    if not devices:
        return "xla", _cutlass.problem() or ""
    default = jax.devices()[0]
    if default not in devices:
        return "xla", f"JAX's default device is {default}; CUTLASS runs on CUDA devices alone."
    return _dispatch.choose(None)


def _self_test() -> SelfTest:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(M, K)).astype(jnp.bfloat16)
    w = (rng.normal(size=(K, N)) / np.sqrt(K)).astype(np.float32)
    bias = rng.normal(size=N).astype(np.float32)
    expected, tolerance = _reference(x, w, bias)
    call = jax.jit(lambda x, kernel, bias: fp8_dense(x, kernel, bias, activation="gelu"))
    times = []
    try:
        arguments = jax.device_put((x, PaddedKernel.from_dense(w), bias))
        result = np.asarray(call(*arguments)).astype(np.float64)
        for _ in range(CALLS):
            start = time.perf_counter()
            jax.block_until_ready(call(*arguments))
            times.append(1e3 * (time.perf_counter() - start))
    except Exception as failure:  # whatever is broken, the report says what
        return SelfTest(False, float("inf"), None, f"{type(failure).__name__}: {failure}")
    if result.shape != expected.shape:
        message = f"the result has shape {result.shape}, not {expected.shape}"
        return SelfTest(False, float("inf"), statistics.median(times), message)
    shares = np.abs(result - expected) / tolerance
    error = float(np.max(np.where(np.isnan(shares), np.inf, shares)))
    return SelfTest(error <= 1.0, error, statistics.median(times))


def _reference(
    x: np.ndarray, w: np.ndarray, bias: np.ndarray
) -> tuple[Float64[np.ndarray, "M N"], Float64[np.ndarray, "M N"]]:
    """The layer in numpy and float64, on operands rounded to e4m3; and what each may be off by."""
    qx, qw = _round_to_fp8(x), _round_to_fp8(w.T).T
    pre = qx @ qw + bias
    expected = 0.5 * pre * (1 + np.tanh(np.sqrt(2 / np.pi) * (pre + 0.044715 * pre**3)))
    sums = np.abs(qx) @ np.abs(qw) + np.abs(bias)
    return expected, OUTPUT_ROUNDING * np.abs(expected) + GELU_SLOPE * SUM_ROUNDING * sums


def _round_to_fp8(rows: np.ndarray) -> np.ndarray:
    """Each row rounded to e4m3 with a scale of its own, and multiplied by it again."""
    rows = rows.astype(np.float32)
    scale = np.abs(rows).max(axis=1, keepdims=True) * np.float32(1 / FP8_MAX)
    codes = np.clip(rows * (np.float32(1) / scale), -FP8_MAX, FP8_MAX).astype(FP8_DTYPE)
    return codes.astype(np.float64) * scale


def _plugin_lines(plugin: _cutlass.Plugin, ffi: tuple[int, int]) -> list[str]:
    lines = []
    if plugin.path is not None:
        lines.append(f"found at {plugin.path}")
    if plugin.build:
        lines.append(_describe_build(plugin.build, ffi))
    return [*lines, "its kernels can be called" if plugin.problem is None else plugin.problem]


def _describe_build(build: dict[str, Any], ffi: tuple[int, int]) -> str:
    parts = [f"XLA FFI {_dotted(build['ffi'])} (jaxlib here: {_dotted(ffi)})"]
    if "cuda" in build:  # CUDART_VERSION: 1000 * major + 10 * minor
        parts.insert(0, f"CUDA {build['cuda'] // 1000}.{build['cuda'] % 1000 // 10}")
    if "kernels" in build:
        parts.append(f"{len(build['kernels'])} kernels")
    known = ("calls", "ffi", "cuda", "kernels")
    parts += [f"{name} {value}" for name, value in build.items() if name not in known]
    return "built with " + ", ".join(parts)


def _dotted(version: Any) -> str:
    return ".".join(map(str, version))


def _self_test_line(test: SelfTest) -> str:
    if test.message is not None:
        return f"FAILED: {test.message}"
    outcome = "passed" if test.passed else "FAILED"
    return (
        f"{outcome}: {test.milliseconds:.3f} ms a call, largest error {test.error:.2f} of what the "
        "arithmetic allows"
    )


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, 96, initial_indent="  ", subsequent_indent="    ") or [""]
