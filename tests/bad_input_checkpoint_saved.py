"""Bad input: trees that cannot be saved as a checkpoint; what was there stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bad_input import Case
from checkpoint_files import write
from update_cases import weight

from jaxfp8.checkpoint import save_safetensors
from jaxfp8.padded import DenseWeight, PaddedKernel


def kernel(*stack: int) -> PaddedKernel:
    return PaddedKernel.from_dense(jnp.asarray(weight(*stack, 18, 20)))


def saving(
    name: str,
    make: Callable[[], Any],
    error: type[Exception],
    *says: str,
    there: str = "model.safetensors",
    names: Any = None,
    split: Any = None,
) -> Case:
    """A tree that is saved where a checkpoint is."""

    def prepare(folder: Path) -> tuple[Any, Callable[[], object]]:
        write(folder / there, {"up.weight": weight(20, 18)})
        params = make()

        def save() -> None:
            before = {file.name: file.read_bytes() for file in folder.iterdir()}
            try:
                save_safetensors(params, folder, names=names, split=split)
            finally:
                assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

        arrays = (jax.Array, np.ndarray)
        return [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, arrays)], save

    return Case(name, prepare, error, says)


CASES = [
    saving(
        "beside files of another checkpoint",
        lambda: {"up": {"kernel": kernel()}},
        ValueError,
        "`path`",
        "model-00001-of-00002.safetensors",
        "save elsewhere",
        there="model-00001-of-00002.safetensors",
    ),
    saving(
        "an abstract tree",
        lambda: jax.eval_shape(lambda: {"up": {"kernel": kernel()}}),
        ValueError,
        "up/kernel: it is abstract",
        "nothing has been written",
    ),
    saving(
        "a loaded weight",
        lambda: {"up": {"kernel": DenseWeight(weight(20, 18), "out_in")}},
        ValueError,
        "up/kernel: it is a DenseWeight",
        "`update_params`",
    ),
    saving(
        "a padded kernel that was cast",
        lambda: {"up": {"kernel": jax.tree.map(lambda a: a.astype(jnp.bfloat16), kernel())}},
        ValueError,
        "up/kernel: ",
        "A cast over the whole tree",
    ),
    saving(
        "a dtype that the format lacks",
        lambda: {"a": jnp.ones(3, jnp.int4)},
        ValueError,
        "a: its dtype is int4",
        "Cast it",
    ),
    saving(
        "a stack without names",
        lambda: {"h": {"kernel": kernel(3)}},
        ValueError,
        "h/kernel: it is a stack",
        "'h/kernel[0]'",
        "`names`",
    ),
    saving(
        "a path without a name",
        lambda: {"up": {"kernel": kernel()}, "norm": {"scale": jnp.ones(18)}},
        ValueError,
        "norm/scale: `names` has no name for norm/scale",
        "(pattern, None)",
        names=[("up/kernel", "up.weight")],
    ),
    saving(
        "a stack with a layer unnamed",
        lambda: {"h": {"kernel": kernel(3)}},
        ValueError,
        "no name for h/kernel[2]",
        names=[(r"h/kernel\[([01])\]", r"h.\1.weight")],
    ),
    saving(
        "two parameters of one name",
        lambda: {"up": {"kernel": kernel()}, "down": {"kernel": kernel()}},
        ValueError,
        "two parameters have the name 'up.weight'",
        names=[(".*", "up.weight")],
    ),
    saving(
        "a quantized weight of another name",
        lambda: {"up": {"kernel": kernel()}},
        ValueError,
        "up/kernel",
        "the name 'up.w13'",
        "'up.weight'",
        names=[(".*", "up.w13")],
    ),
    saving(
        "the kernel of a convolution",
        lambda: {"conv": {"kernel": jnp.ones((3, 3, 4, 8))}},
        ValueError,
        "conv/kernel: it has shape (3, 3, 4, 8)",
        "[in_features, out_features]",
    ),
    saving(
        "a module taken apart by sizes that do not add up",
        lambda: {"qkv": {"kernel": kernel()}},
        ValueError,
        "qkv/kernel: it has 20 output features",
        "19 in all",
        "Correct the sizes",
        split={"qkv": {"q": 10, "k": 9}},
    ),
    saving(
        "a bias that the sizes do not fit",
        lambda: {"qkv": {"kernel": kernel(), "bias": jnp.ones(21)}},
        ValueError,
        "qkv/bias: it has 21 output features",
        split={"qkv": {"q": 10, "k": 10}},
    ),
    saving(
        "a module to take apart that is not there",
        lambda: {"up": {"kernel": kernel()}},
        ValueError,
        "`split` takes apart qkv, but no module",
        "there is up",
        split={"qkv": {"q": 10, "k": 10}},
    ),
    saving(
        "a shard that is there",
        lambda: {"a": {"qk": {"kernel": kernel()}, "q": {"kernel": kernel()}}},
        ValueError,
        "`split` takes a/qk apart into a/q",
        "`params` has a/q/kernel already",
        split={"qk": {"q": 10, "k": 10}},
    ),
    saving(
        "a shard of two modules",
        lambda: {"a": {"qk": {"kernel": kernel()}, "kv": {"kernel": kernel()}}},
        ValueError,
        "`split` takes a/qk apart into a/k",
        "that is a shard of a/kv too",
        split={"qk": {"q": 10, "k": 10}, "kv": {"k": 10, "v": 10}},
    ),
    saving(
        "a module taken apart into nothing",
        lambda: {"qkv": {"kernel": kernel()}},
        ValueError,
        "`split` must give each shard its output features",
        split={"qkv": {}},
    ),
    saving(
        "a module taken apart without sizes",
        lambda: {"qkv": {"kernel": kernel()}},
        ValueError,
        "`split` must give each shard its output features",
        split={"qkv": ("q", "k", "v")},
    ),
    saving(
        "a stack of biases taken apart as a whole",
        lambda: {"qkv": {"kernel": kernel(), "bias": jnp.ones((3, 20))}},
        ValueError,
        "qkv/bias: it has shape (3, 20)",
        "`names`",
        split={"qkv": {"q": 10, "k": 10}},
    ),
]
