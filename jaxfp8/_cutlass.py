"""The custom calls: finding the plugin library, its targets, and their attributes."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfp8._xla import ACTIVATIONS
from jaxfp8.quantize import FP8_DTYPE, is_fp8


if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float8e4m3fn, Float32


# A changed meaning of operands or attributes gets a new number; old handlers stay in the library,
# so that exported programs keep running.
MATMUL_TARGET = "jaxfp8_scaled_matmul_v1"
DENSE_TARGET = "jaxfp8_dense_v1"
QUANTIZE_TARGET = "jaxfp8_quantize_v1"
WEIGHT_SCALE_TARGET = "jaxfp8_weight_scale_v1"
PAD_WEIGHT_TARGET = "jaxfp8_pad_weight_v1"
TARGETS = (MATMUL_TARGET, DENSE_TARGET, QUANTIZE_TARGET, WEIGHT_SCALE_TARGET, PAD_WEIGHT_TARGET)
COMPUTE_CAPABILITY = "9.0"
# The attribute `kernel` of both products: an index into the library's list of kernels, which tests
# and tuning name outright, or this, the choice of `cuda/src/table.h`.
FROM_TABLE = np.int32(-1)
# TMA addresses rows that begin at multiples of 16 bytes. Others are stored by classes of rows, up
# to 8 of them (`cuda/src/store.cuh`).
TMA_BYTES = 16
# The most rows of x that a kernel of `cuda/src/kernels.h` takes at a time: what lies beyond M is
# slower to leave out than to read (`with_readable_rows` in `cuda/src/gemm.cuh`).
TILE_ROWS = 256
# What this package asks of the handlers; `kCalls` in `cuda/src/build_info.cc` says what they take.
CALLS = 6
HOW_TO_INSTALL = "Build and install it with `make cuda` in a checkout of jaxfp8 (some minutes)."


@dataclasses.dataclass(frozen=True)
class Plugin:
    """What was found of the plugin. `problem` is None if its targets are registered.

    Attributes:
        path: the shared library, if one was found.
        build: what the library says of its build: CUDA, CUTLASS, FFI version, kernels.
        problem: a sentence that says why it cannot be used, and what to do.
    """

    path: str | None
    build: dict[str, Any]
    problem: str | None


@functools.cache
def plugin() -> Plugin:
    """Find, open and register the plugin library, once per process."""
    path = os.environ.get("JAXFP8_LIBRARY")
    if path is None:
        try:
            path = importlib.import_module("jaxfp8_cuda13").library_path()
        except ModuleNotFoundError:
            why = f"the plugin `jaxfp8-cuda13` is not installed. {HOW_TO_INSTALL}"
            return Plugin(None, {}, why)
        except FileNotFoundError as error:
            why = f"the plugin `jaxfp8-cuda13` has lost its library: {error} {HOW_TO_INSTALL}"
            return Plugin(None, {}, why)
    try:
        library = ctypes.CDLL(path)
        library.jaxfp8_build_info.restype = ctypes.c_char_p
        build = json.loads(library.jaxfp8_build_info())
    except (OSError, AttributeError) as error:
        return Plugin(path, {}, f"the library {path} cannot be opened: {error}. {HOW_TO_INSTALL}")
    if problem := check_ffi_version(build["ffi"], jaxlib_ffi_version()):
        return Plugin(path, build, problem)
    if build.get("calls", 1) < CALLS:
        why = f"the library {path} is older than this jaxfp8 and refuses some of its calls."
        return Plugin(path, build, f"{why} {HOW_TO_INSTALL}")
    for target in TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, f"{target}_execute"))
        jax.ffi.register_ffi_target(target, handler, platform="CUDA")
    return Plugin(path, build, None)


def jaxlib_ffi_version() -> tuple[int, int]:
    """The XLA FFI version of the installed jaxlib, from the header that it ships."""
    header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    major, minor = (
        re.search(rf"#define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR")
    )
    assert major is not None and minor is not None
    return int(major[1]), int(minor[1])


def check_ffi_version(built: list[int], installed: tuple[int, int]) -> str | None:
    """Why a library built for FFI version `built` cannot run on `installed`, or None.

    XLA accepts handlers of an older minor version and rejects newer ones; on a GPU it then says
    only that no handler is registered.
    """
    if built[0] == installed[0] and built[1] <= installed[1]:
        return None
    return (
        f"the plugin was built for XLA FFI {built[0]}.{built[1]}, but the installed jaxlib has "
        f"{installed[0]}.{installed[1]}. Install a plugin and a jaxlib that belong together: "
        "upgrade jaxlib, or rebuild the plugin with `make cuda`."
    )


@functools.cache
def cuda_devices() -> tuple[jax.Device, ...]:
    """The CUDA devices that JAX sees, none on a machine without."""
    try:
        return tuple(jax.devices("cuda"))
    except RuntimeError:
        return ()


def problem() -> str | None:
    """Why the CUTLASS path cannot run in this process, or None if it can."""
    devices = cuda_devices()
    if not devices:
        return (
            "no CUDA device is visible to JAX. It needs a Hopper GPU (compute capability "
            f"{COMPUTE_CAPABILITY}) and a JAX with CUDA: `pip install jax[cuda13]`."
        )
    for device in devices:
        if device.compute_capability != COMPUTE_CAPABILITY:
            return (
                f"{device} ({device.device_kind}) has compute capability "
                f"{device.compute_capability}, but the kernels are built for "
                f"{COMPUTE_CAPABILITY} (Hopper: H100, H200). Hide it with CUDA_VISIBLE_DEVICES, "
                'or use implementation="xla".'
            )
    return plugin().problem


def scaled_matmul(
    lhs: Float8e4m3fn[Array, "M K_pad"],
    rhs: Float8e4m3fn[Array, "N_pad K_pad"],
    lhs_scale: Float32[Array, "..."],
    rhs_scale: Float32[Array, "..."],
    bias: Float32[Array, " N"] | None,
    out_scale: Float32[Array, ""] | None = None,
    residual: Float[Array, "M N"] | None = None,
    *,
    out_features: int,
    activation: str | None,
    out_dtype: Any,
    promoted: bool,
) -> Float[Array, "M N"] | Float8e4m3fn[Array, "M N_pad"]:
    """`_xla.scaled_matmul` as a custom call."""
    if residual is not None and not _adds(out_features, out_dtype):
        operands = lhs, rhs, lhs_scale, rhs_scale, bias, None
        product = functools.partial(scaled_matmul, *operands, promoted=promoted)
        return _add_apart(product, residual, out_features, activation, out_dtype)
    (out,) = call(
        MATMUL_TARGET,
        [_result(lhs.shape[0], rhs, out_features, out_dtype)],
        [lhs, rhs, lhs_scale, rhs_scale, *map(or_empty, (bias, out_scale, residual))],
        out_features=np.int64(out_features),
        activation=_activation_code(activation),
        kernel=FROM_TABLE,
        promoted=np.int32(promoted),
    )
    return out


def quantize_rows(
    x: Float[Array, "M K"], x_scale: Float32[Array, ""] | None, *, width: int
) -> tuple[Float8e4m3fn[Array, "M K_pad"], Float32[Array, "..."]]:
    """`_xla.quantize_rows` as a custom call: one read of x, which stays in registers."""
    m = x.shape[0]
    qx, scale = call(
        QUANTIZE_TARGET,
        [((m, width), FP8_DTYPE), ((m, 1), jnp.float32)],
        [x, or_empty(x_scale)],
    )
    return qx, scale if x_scale is None else x_scale


def dense(
    x: Float[Array, "M K"],
    qvalue: Float8e4m3fn[Array, "N_pad K_pad"],
    scale: Float32[Array, "..."],
    bias: Float32[Array, " N"] | None,
    x_scale: Float32[Array, ""] | None,
    out_scale: Float32[Array, ""] | None = None,
    residual: Float[Array, "M N"] | None = None,
    *,
    out_features: int,
    activation: str | None,
    out_dtype: Any,
    promoted: bool,
) -> Float[Array, "M N"] | Float8e4m3fn[Array, "M N_pad"]:
    """`_xla.dense` as one custom call: a quantize kernel and the GEMM behind it."""
    if residual is not None and not _adds(out_features, out_dtype):
        operands = x, qvalue, scale, bias, x_scale, None
        product = functools.partial(dense, *operands, promoted=promoted)
        return _add_apart(product, residual, out_features, activation, out_dtype)
    m, k_pad = x.shape[0], qvalue.shape[1]
    rows = scratch_rows(m, out_features, out_dtype)
    out, _, _ = call(
        DENSE_TARGET,
        [
            _result(m, qvalue, out_features, out_dtype),
            ((rows, k_pad), qvalue.dtype),  # scratch: the quantized x
            ((rows,), jnp.float32),  # scratch: its scales
        ],
        [x, qvalue, scale, *map(or_empty, (bias, x_scale, out_scale, residual))],
        out_features=np.int64(out_features),
        activation=_activation_code(activation),
        kernel=FROM_TABLE,
        promoted=np.int32(promoted),
    )
    return out


def _result(m: Any, qvalue: jax.Array, out_features: int, out_dtype: Any) -> tuple:
    """Shape and dtype of a product: logical width, or padded as the next product reads it."""
    return (m, qvalue.shape[0] if is_fp8(out_dtype) else out_features), out_dtype


def _by_tma(out_features: int, out_dtype: Any) -> bool:
    """Whether TMA addresses the rows of a result."""
    return out_features * jnp.dtype(out_dtype).itemsize % TMA_BYTES == 0


def _adds(out_features: int, out_dtype: Any) -> bool:
    """Whether there are kernels that add a residual: to rows of 16 bits that TMA addresses."""
    return jnp.dtype(out_dtype).itemsize == 2 and _by_tma(out_features, out_dtype)


def _add_apart(
    product: Callable[..., jax.Array],
    residual: Float[Array, "M N"],
    out_features: int,
    activation: str | None,
    out_dtype: Any,
) -> Float[Array, "M N"]:
    """Any other residual is added by XLA, in float32 and rounded once, as in the epilogue."""
    y = product(out_features=out_features, activation=activation, out_dtype=jnp.float32)
    return (y + residual.astype(jnp.float32)).astype(out_dtype)


def scratch_rows(m: Any, out_features: int, out_dtype: Any) -> Any:
    """The rows of the dense call's scratch: whole tiles, whose rest is read and never used.

    M may be symbolic.
    """
    tiles = (m + TILE_ROWS - 1) // TILE_ROWS
    if not is_fp8(out_dtype) and not _by_tma(out_features, out_dtype):
        tiles += 1  # each of up to 8 classes of rows ends in a tile, the last behind all others
    return tiles * TILE_ROWS


def call(
    target: str, results: list[tuple], operands: list[jax.Array], **attributes: Any
) -> list[jax.Array]:
    """A custom call, also inside `shard_map`."""

    # Under shard_map all operands must vary over the same mesh axes, and the results are typed as
    # varying over none; both are said here. Outside shard_map the sets are empty.
    def varying(a: jax.Array) -> frozenset:
        aval = jax.typeof(a)  # jax 0.10 renamed vma
        return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying

    axes = tuple(sorted(frozenset().union(*map(varying, operands))))

    def vary(a: jax.Array) -> jax.Array:
        missing = tuple(name for name in axes if name not in varying(a))
        return lax.pcast(a, missing, to="varying") if missing else a

    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    outs = jax.ffi.ffi_call(target, shapes)(*map(vary, operands), **attributes)
    return [vary(out) for out in outs]


def or_empty(a: jax.Array | None) -> jax.Array:
    """An absent operand is an empty one: a custom call has a fixed number of operands."""
    return jnp.zeros((0,), jnp.float32) if a is None else a


def _activation_code(activation: str | None) -> np.int32:
    return np.int32(list(ACTIVATIONS).index(activation))
