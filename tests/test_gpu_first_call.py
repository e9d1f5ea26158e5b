"""The first call of every kernel of a process, inside a CUDA graph's capture and outside of it."""

import os
import subprocess
import sys

import numpy as np
import pytest


pytestmark = pytest.mark.gpu

# What a kernel needs before its first launch must come while XLA captures that: none of the
# chain's kernels has run before, and its products take several.
PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jaxfp8 import PaddedKernel, fp8_dense, quantize_input, reload_params

assert jax.default_backend() == "gpu"
sizes = [1280, 3420, 256, 100, 512, 96, 1280]
normal = lambda seed, shape: jax.random.normal(jax.random.key(seed), shape, jnp.float32)
dense = [normal(i, pair) / 16 for i, pair in enumerate(zip(sizes, sizes[1:]))]
served = [PaddedKernel.from_dense(w) for w in dense]
served = reload_params(served, [2 * w for w in dense])

@jax.jit
def chain(x, weights):
    for weight in weights:
        x = fp8_dense(x, weight, activation="gelu", implementation="cutlass")
    return fp8_dense(quantize_input(x), weights[0], implementation="cutlass", precision="high")

inputs = [normal(m, (m, sizes[0])).astype(jnp.bfloat16) for m in (1, 300, 2050)]
found = [chain(x, served) for x in inputs for _ in range(3)]
np.savez(sys.argv[1], *(np.asarray(a.astype(jnp.float32)) for a in found))
"""
# From one call on, and none.
FLAGS = {
    "captured": "--xla_gpu_graph_min_graph_size=1",
    "direct": "--xla_gpu_enable_command_buffer=",
}


def test_kernels_are_loaded_where_their_first_launch_is_captured(tmp_path):
    results = {}
    for name, flags in FLAGS.items():
        out = tmp_path / f"{name}.npz"
        environment = os.environ | {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(out)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        with np.load(out) as arrays:
            results[name] = list(arrays.values())
    for captured, direct in zip(*results.values(), strict=True):
        assert np.abs(direct).max() > 0
        np.testing.assert_array_equal(captured, direct)
