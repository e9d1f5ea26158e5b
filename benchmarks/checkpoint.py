"""Host memory that loading a sharded checkpoint takes: bfloat16 files into a padded FP8 tree.

Made here: a decoder's dense layers in one file a layer, with an index. Loaded with q/k/v and
gate/up fused, into one tree with a branch for each layer and into one stacked for `nn.scan`. What
counts is anonymous memory beyond that of the process with the served tree: pages of a mapped file
are the kernel's to drop. On a CPU that holds the device's side too, the loaded leaf and what XLA
allocates to measure it, so there the arrays that Python allocated count (tracemalloc, in a load of
its own). The first load also compiles.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import gc
import math
import multiprocessing
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _report
from jaxfp8._bundles import OneByOne
from jaxfp8._bundles import measure as measure_leaves
from jaxfp8._convert import Quantize
from jaxfp8.checkpoint import load_safetensors
from jaxfp8.checkpoint._write import Output, write_directory
from jaxfp8.padded import DenseWeight, PaddedKernel, padded_size
from jaxfp8.update import reload_params


FUSE = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
# Llama-3-8B's, but for the 1/4 of its layers and an MLP width that is no multiple of 16.
WIDTH, KEY_VALUE, HIDDEN = 4096, 1024, 11004
NAMES = {
    "branches": [(r"layers\.(\d+)\.(\w+)\.weight", r"layers_\1/\2/kernel")],
    "stacked": [(r"layers\.(\d+)\.(\w+)\.weight", r"layers/\2/kernel[\1]")],
}
# What one load may take beyond its largest leaf.
ALLOWED = 1.1
SAMPLE_SECONDS = 0.001


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=6, help="6 make 2.1 GB (default)")
    parser.add_argument("--divisor", type=int, default=1, help="of all widths (default: 1)")
    parser.add_argument("--loads", type=int, default=3, help="the first compiles (default: 3)")


def run(options: argparse.Namespace) -> int:
    """Measure, print and write; 1 if a load took more than its largest leaf and 10 %."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        written = write_checkpoint(Path(folder), options.layers, options.divisor)
        for tree in _report.Progress(len(NAMES)).steps(NAMES):
            # A process of its own, so that nothing before has left memory behind.
            spawn = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
                arguments = (folder, tree, options.layers, options.divisor, options.loads)
                rows.extend(pool.submit(measure, *arguments).result())
    content = {
        "benchmark": "checkpoint",
        "is_gpu_number": jax.default_backend() == "gpu",
        "environment": _report.environment(jax.devices()[0].device_kind),
        "checkpoint_bytes": written,
        "layers": options.layers,
        "rows": rows,
    }
    _print(content)
    _report.write_json(options.out, "checkpoint", content)
    return int(any(row["wrong"] or not row["fits"] for row in rows))


def sizes(divisor: int) -> dict[str, tuple[int, int]]:
    """The `[N, K]` of each weight of a layer."""
    width, key_value, hidden = (size // divisor for size in (WIDTH, KEY_VALUE, HIDDEN))
    return {
        "q": (width, width),
        "k": (key_value, width),
        "v": (key_value, width),
        "o": (width, width),
        "gate": (hidden, width),
        "up": (hidden, width),
        "down": (width, hidden),
    }


def write_checkpoint(folder: Path, layers: int, divisor: int) -> int:
    """A file for each layer, and an index; the bytes of the weights."""
    rng = np.random.default_rng(0)
    values = {
        name: rng.standard_normal(shape, np.float32).astype(jnp.bfloat16)
        for name, shape in sizes(divisor).items()
    }
    outputs = {}
    for layer in range(layers):
        for name, value in values.items():
            # Powers of two, so that every layer has its own scales and the same e4m3 values.
            scaled = value.dtype.type(2.0**-layer)
            outputs[f"layers.{layer}.{name}.weight"] = Output(
                value.shape, value.dtype, lambda value=value, scaled=scaled: value * scaled
            )
    total = sum(output.nbytes for output in outputs.values())
    write_directory(folder, outputs, None, -(-total // layers))
    return total


def served(tree: str, layers: int, divisor: int) -> dict[str, Any]:
    """A padded tree of zeros, fused, for the checkpoint."""
    found = sizes(divisor)
    for fused, shards in FUSE.items():
        shapes = [found.pop(shard) for shard in shards]
        found[fused] = (sum(n for n, _ in shapes), shapes[0][1])

    def layer(*stack: int) -> dict[str, Any]:
        return {
            name: {
                "kernel": PaddedKernel(
                    jnp.zeros((*stack, padded_size(n), padded_size(k)), jnp.float8_e4m3fn),
                    jnp.ones((*stack, padded_size(n)), jnp.float32),
                    k,
                    n,
                )
            }
            for name, (n, k) in found.items()
        }

    if tree == "stacked":
        return {"layers": layer(layers)}
    return {f"layers_{i}": layer() for i in range(layers)}


class Memory:
    """The peaks of a process's memory while a block runs, in bytes, sampled by a thread."""

    def __enter__(self) -> Memory:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.before = self.peak = read_memory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            now = read_memory()
            self.peak = {kind: max(now[kind], self.peak[kind]) for kind in now}


def read_memory() -> dict[str, int]:
    """Anonymous and file-backed resident memory of this process (proc(5): RssAnon, RssFile)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {kind: int(fields[kind].split()[0]) * 1024 for kind in ("RssAnon", "RssFile")}


def measure(folder: str, tree: str, layers: int, divisor: int, loads: int) -> list[dict[str, Any]]:
    """One row for each load of the checkpoint into the same buffers."""
    params = jax.block_until_ready(served(tree, layers, divisor))
    rows = []
    for load in range(loads):
        with Memory() as memory:
            start = time.perf_counter()
            loaded = load_safetensors(folder, names=NAMES[tree], fuse=FUSE)
            opened = time.perf_counter()
            params = jax.block_until_ready(reload_params(params, loaded))
            done = time.perf_counter()
        del loaded
        taken = {kind: memory.peak[kind] - memory.before[kind] for kind in memory.peak}
        rows.append(
            {
                "tree": tree,
                "load": load,
                "open_seconds": opened - start,
                "reload_seconds": done - opened,
                "anonymous": taken["RssAnon"],
                "mapped": taken["RssFile"],
                "process": memory.before["RssAnon"],
                "served": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
                "wrong": wrong(params, tree, layers),
            }
        )
    tracemalloc.start()
    loaded = load_safetensors(folder, names=NAMES[tree], fuse=FUSE)
    jax.block_until_ready(reload_params(params, loaded))
    _, host_arrays = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for row in rows:
        counts = row["anonymous"] if jax.default_backend() == "gpu" else host_arrays
        row["largest_layer"] = largest_layer(loaded)
        row["host_arrays"] = host_arrays
        row["xla_temporaries"] = xla_temporaries(loaded)
        row["fits"] = counts <= ALLOWED * row["largest_layer"] or row["load"] == 0
    return rows


def weights(loaded: Any) -> list[DenseWeight]:
    """The loaded weights."""
    found = jax.tree.leaves(loaded, is_leaf=lambda node: isinstance(node, DenseWeight))
    return [weight for weight in found if isinstance(weight, DenseWeight)]


def largest_layer(loaded: Any) -> int:
    """The bytes of the largest `[N, K]`; of a stack, one element's."""
    values = [weight.value for weight in weights(loaded)]
    return max(math.prod(value.shape[-2:]) * value.dtype.itemsize for value in values)


def xla_temporaries(loaded: Any) -> int:
    """The most that XLA allocates to measure one layer; on a CPU it is host memory."""
    values = [weight.value for weight in weights(loaded)]
    avals = {jax.ShapeDtypeStruct(value.shape[-2:], value.dtype) for value in values}
    method = OneByOne(Quantize("out_in", True))
    compiled = (measure_leaves.lower(method, ((aval,),)).compile() for aval in avals)
    return max(program.memory_analysis().temp_size_in_bytes for program in compiled)


def wrong(params: Any, tree: str, layers: int) -> bool:
    """Whether the last layer is not the first with its scales divided by a power of two."""
    if tree == "stacked":
        kernel = params["layers"]["down"]["kernel"]
        values, scales = ([a[0], a[-1]] for a in (kernel.qvalue, kernel.scale))
    else:
        kernels = [params[f"layers_{i}"]["down"]["kernel"] for i in (0, layers - 1)]
        values, scales = [k.qvalue for k in kernels], [k.scale for k in kernels]
    codes = [jax.lax.bitcast_convert_type(value, jnp.uint8) for value in values]
    return not (
        bool(codes[0].any())
        and bool(jnp.array_equal(*codes))
        and bool(jnp.array_equal(scales[0], scales[1] * 2.0 ** (layers - 1)))
    )


def _print(content: dict[str, Any]) -> None:
    def megabytes(size: float) -> str:
        return f"{size / 1e6:.1f}"

    _report.print_table(
        f"{content['checkpoint_bytes'] / 1e9:.2f} GB of bfloat16 in {content['layers']} files. MB; "
        "the last five at the peak, beyond the process with the served tree",
        [
            "tree",
            "load",
            "s",
            "served\ntree",
            "process\nwith it",
            "largest\nlayer",
            "host\narrays",
            "host arrays\n/ layer",
            "anonymous",
            "XLA's\ntemporaries",
            "mapped\nfiles",
        ],
        [
            [
                row["tree"],
                "first, compiles" if row["load"] == 0 else str(row["load"] + 1),
                f"{row['open_seconds'] + row['reload_seconds']:.1f}",
                megabytes(row["served"]),
                megabytes(row["process"]),
                megabytes(row["largest_layer"]),
                megabytes(row["host_arrays"]),
                _report.number(row["host_arrays"] / row["largest_layer"], 2),
                megabytes(row["anonymous"]),
                megabytes(row["xla_temporaries"]),
                megabytes(row["mapped"]),
            ]
            for row in content["rows"]
        ],
    )
