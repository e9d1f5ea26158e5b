"""Bad input: checkpoints of intact files that contradict themselves, or do not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from bad_input import Case
from checkpoint_files import codes, compressed, into, scalar, write, write_config
from update_cases import weight


N, K = 20, 18
W = weight(N, K)
CODES = codes(N, K)
SHARDS = {f"a.{name}.weight": weight(n, K) for name, n in {"q": 20, "k": 10, "v": 10}.items()}
QKV = {"qkv": ("q", "k", "v")}
LAYERS = [(r"h\.(\d)\.weight", r"h/kernel[\1]"), (r"h\.weight", "h/kernel")]


def loading(
    name: str,
    tensors: Mapping[str, np.ndarray],
    *says: str,
    config: Mapping[str, Any] | None = None,
    error: type[Exception] = ValueError,
    **options: Any,
) -> Case:
    """A checkpoint that is loaded and written into a served tree."""

    def prepare(folder: Path) -> tuple[Any, Callable[[], object]]:
        write(folder / "model.safetensors", tensors)
        if config is not None:
            write_config(folder, config)
        return into(folder, **options)

    return Case(name, prepare, error, says)


NAMES = [
    loading(
        "unmatched names",
        {"up.weight": W, "norm.weight": W, "head.weight": W},
        "2 tensors",
        "norm.weight, head.weight",
        "`ignore`",
        names=[(r"up\.weight", "up/kernel")],
    ),
    loading(
        "two tensors at one path",
        {"up.weight": W, "down.weight": W},
        "'up.weight'",
        "'down.weight'",
        "the same path, up/kernel",
        names=[(".*", "up/kernel")],
    ),
    loading(
        "a group that the pattern lacks",
        {"up.weight": W},
        "'up.weight'",
        "invalid group reference 3",
        "of which there are 1",
        names=[(r"up\.(weight)", r"up/\3")],
    ),
    loading(
        "names as a dict",
        {"up.weight": W},
        "`names`",
        "`.items()`",
        error=TypeError,
        names={"up.weight": "up/kernel"},
    ),
    loading(
        "nothing as ignore",
        {"up.weight": W},
        "`ignore`",
        "None",
        error=TypeError,
        ignore=None,
    ),
    loading(
        "a path within another",
        {"up.weight": W, "norm": W},
        "up/kernel",
        "up/kernel/norm",
        names=[(r"up\.weight", "up/kernel"), ("norm", "up/kernel/norm")],
    ),
    loading(
        "a path that is none",
        {"up.weight": W},
        "'up//kernel'",
        "keys joined by '/'",
        names=[(".*", "up//kernel")],
    ),
    loading(
        "a pattern that is none",
        {"up.weight": W},
        "regular expression",
        error=TypeError,
        names=[("(", "up/kernel")],
    ),
    loading(
        "a convolution at a kernel",
        {"up.weight": np.ones((4, 3, 2), "f4")},
        "'up.weight'",
        "(4, 3, 2)",
        "does not end in 'kernel'",
    ),
    loading(
        "a tensor that the model lacks",
        {"up.weight": W, "extra.weight": W},
        "Unexpected in `loaded` (1): extra/kernel",
    ),
    loading("another size", {"up.weight": weight(N, K + 1)}, "up/kernel", "(20, 19)", "(20, 18)"),
]

FUSED = [
    loading(
        "a fused layer with a shard ignored",
        SHARDS,
        "a/qkv/kernel",
        "'a.k.weight'",
        "quantizes only some",
        fuse=QKV,
        config=compressed(ignore=["a.k"]),
    ),
    loading(
        "a fused layer with a shard dense",
        {**SHARDS, "a.k.weight": codes(10, K), "a.k.weight_scale": scalar(1)},
        "a/qkv/kernel",
        "'a.k.weight'",
        "float8_e4m3fn (10, 18)",
        "all quantized or none",
        fuse=QKV,
    ),
    loading(
        "a fused layer without a shard",
        {k: v for k, v in SHARDS.items() if "v" not in k},
        "a/qkv/kernel",
        "nothing is there for v",
        fuse=QKV,
    ),
    loading(
        "shards of other inputs",
        {**SHARDS, "a.k.weight": weight(10, K + 1)},
        "a/qkv/kernel",
        "(10, 19)",
        "number of input features",
        fuse=QKV,
    ),
    loading(
        "a bias for some shards without kernels",
        {"a.q.bias": weight(20)},
        "a/qkv/bias",
        "nothing is there for k, v",
        fuse=QKV,
    ),
    loading(
        "another parameter for some shards",
        {**SHARDS, "a.q.gain": weight(20)},
        "a/qkv/gain",
        "nothing is there for k, v",
        fuse=QKV,
    ),
    loading(
        "a fused layer twice",
        {**SHARDS, "a.qkv.weight": W},
        "a/qkv/kernel",
        "made twice",
        "'a.qkv.weight'",
        fuse=QKV,
    ),
    loading(
        "a shard of two fused layers",
        SHARDS,
        "`fuse`",
        "each shard once",
        fuse={"qkv": ("q", "k", "v"), "kv": ("k", "v")},
    ),
    loading(
        "shards that do not add up",
        {"qkv.weight": W},
        "qkv/kernel",
        "'qkv.weight'",
        "20 output features",
        "30 in all",
        split={"qkv": {"q": 10, "k": 10, "v": 10}},
    ),
    loading(
        "a shard of no features",
        {"qkv.weight": W},
        "`split`",
        "at least 1",
        split={"qkv": {"q": 20, "k": 0}},
    ),
]

STACKS = [
    loading(
        "a stack with a hole",
        {"h.0.weight": W, "h.3.weight": W},
        "h/kernel[1], h/kernel[2]",
        "(4,)",
        "'h.0.weight'",
        names=LAYERS,
    ),
    loading(
        "a stack of several formats",
        {"h.0.weight": W, "h.1.weight": CODES, "h.1.weight_scale": scalar(1)},
        "h/kernel",
        "'h.1.weight'",
        "all quantized or none",
        names=LAYERS,
    ),
    loading(
        "a stack of several shapes",
        {"h.0.weight": W, "h.1.weight": weight(N, K + 1)},
        "h/kernel",
        "(20, 19)",
        "one shape",
        names=LAYERS,
    ),
    loading(
        "a stack and a whole",
        {"h.0.weight": W, "h.weight": W},
        "h/kernel",
        "'h.weight'",
        "whole and by elements",
        names=LAYERS,
    ),
]

CASES = [*NAMES, *FUSED, *STACKS]
