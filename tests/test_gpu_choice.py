"""The handlers ask the table for the right kernel: each says where its product finds x."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from table_cases import the_plugins_choices


pytestmark = pytest.mark.gpu
# Of few rows either call differs from a GEMM behind a GEMM, or the two from each other.
SIZES = [(16, 4096, 14336), (17, 4096, 14336), (24, 14336, 4096), (48, 4096, 4096)]
WHOLE_TILES, QUANTIZED_HERE, ROWS_ALONE = range(3)
SCRIPT = f"""
import sys

import jax.numpy as jnp
from direct_calls import dense, matmul

from jaxfp8 import PaddedKernel, _cutlass
from jaxfp8.quantize import FP8_DTYPE

_cutlass.plugin()
one = jnp.float32(1)
for m, n, k in {SIZES}:
    for promoted in (False, True):
        w = jnp.zeros((n, k), FP8_DTYPE)
        if sys.argv[1] == "dense":
            weight = PaddedKernel(w, one, k, n)
            y = dense(jnp.zeros((m, k), jnp.bfloat16), weight, promoted=promoted)[0]
        else:
            y = matmul(jnp.zeros((m, k), FP8_DTYPE), w, one, one, promoted=promoted)
        y.block_until_ready()
"""


def printed(call):
    """The lines that `JAXFP8_PRINT_KERNEL` brings: one for each size and accumulation."""
    environment = os.environ | {
        "JAXFP8_PRINT_KERNEL": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    command = [sys.executable, "-c", SCRIPT, call]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("jaxfp8: M=")]


@pytest.mark.parametrize(("call", "place"), [("dense", QUANTIZED_HERE), ("matmul", ROWS_ALONE)])
def test_each_call_has_the_kernel_of_its_input(call, place, tmp_path):
    choices = the_plugins_choices(SIZES, tmp_path)
    if choices is None:
        pytest.skip("there is no C++ compiler")
    # Else the test would pass with another input named.
    for other in {WHOLE_TILES, QUANTIZED_HERE, ROWS_ALONE} - {place}:
        assert any(fast[place] != fast[other] for fast, _ in choices)
    assert printed(call) == [
        f"jaxfp8: M={m} N={n} K={k} -> {of_kind[place]}"
        for (m, n, k), of_shape in zip(SIZES, choices, strict=True)
        for of_kind in of_shape
    ]
