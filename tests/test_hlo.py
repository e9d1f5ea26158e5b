"""What XLA compiles of a serving step: an fp8 weight is never transposed, padded or copied."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers import cuda_text, implementations, randn

from jaxfp8 import PaddedKernel, fp8_dense
from jaxfp8._cutlass import cuda_devices
from jaxfp8.linen import PaddedFP8Dense


# Sizes that no other array has, so that a shape in the HLO tells the weight.
K, N = 1283, 3420
SHAPES = {(3424, 1296)}
MOVES = ("transpose", "pad", "copy", "copy-start", "concatenate", "reverse", "gather")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(")


def moved_weights(
    text: str, shapes: set[tuple[int, ...]], *, for_cuda: bool = bool(cuda_devices())
) -> list[str]:
    """The instructions, also inside fusions, that move an array of one of these shapes.

    Leading axes of 1 do not count, nor does the order of the axes: a transposed weight is one too.
    XLA on CPU has no fp8 arithmetic and moves a widened weight instead; on a GPU only fp8 counts.
    """
    array = re.compile((r"f8e4m3fn" if for_cuda else r"\w+") + r"\[([\d,]+)\]")
    known = {tuple(sorted(shape)) for shape in shapes}
    found = []
    for line in text.splitlines():
        match = INSTRUCTION.match(line)
        if match is None or match[2] not in MOVES:
            continue
        sizes = (tuple(map(int, m[1].split(","))) for m in array.finditer(line))
        if any(tuple(sorted(s for s in size if s != 1)) in known for size in sizes):
            found.append(line.strip())
    return found


def compiled_text(f, *args) -> str:
    return jax.jit(f).lower(*args).compile().as_text()


def kernel_of(seed=0):
    return PaddedKernel.from_dense(randn(seed, (K, N)))


@pytest.mark.parametrize(
    ("move", "shape"),
    [(lambda q: jnp.pad(q, [(0, 4), (0, 13)]), (N, K)), (jnp.transpose, (1296, 3424))],
)
def test_the_detector_sees_moves(move, shape):
    """Broken on purpose: a weight that is padded in the step, or kept `[K, N]`."""

    def step(x, q, scale):
        moved = jax.lax.optimization_barrier(move(q))
        return fp8_dense(x, PaddedKernel(moved, scale, K, N), implementation="xla")

    # On the CPU: XLA's GPU compiler may see through this barrier and move nothing.
    with jax.default_device(jax.devices("cpu")[0]):
        q = jnp.ones(shape, jnp.float8_e4m3fn)
        text = compiled_text(step, randn(1, (16, K)), q, jnp.ones(3424))
    assert moved_weights(text, SHAPES, for_cuda=False)


@implementations
@pytest.mark.parametrize("rows", [(16,), (4, 64)], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_a_serving_step_leaves_the_weight_alone(activation, rows, implementation):
    def step(x, kernel, bias):
        return fp8_dense(x, kernel, bias, activation=activation, implementation=implementation)

    x = randn(2, (*rows, K), jnp.bfloat16)
    text = compiled_text(step, x, kernel_of(), randn(3, (N,)))
    assert f"f8e4m3fn[{3424},{1296}]" in text
    assert moved_weights(text, SHAPES) == []
    if implementation == "cutlass":
        assert len(re.findall(r'custom_call_target="jaxfp8_dense_v1"', text)) == 1


def test_the_layer_leaves_the_weight_alone():
    model = PaddedFP8Dense(N, activation="silu")
    x = randn(4, (8, K), jnp.bfloat16)
    params = jax.jit(model.init)(jax.random.key(0), x)
    assert moved_weights(compiled_text(model.apply, params, x), SHAPES) == []


def test_lowered_for_cuda_the_weight_goes_straight_into_the_call():
    """Without a GPU: the custom call's weight operand is the program's own argument."""
    text = cuda_text(lambda kernel, x: fp8_dense(x, kernel), kernel_of(), randn(5, (16, K)))
    call = re.search(r"custom_call @jaxfp8_dense_v1\(([^)]*)\)", text)
    assert call is not None and call[1].split(", ")[1] == "%arg0"
    touching = [line for line in text.splitlines() if "3424x1296xf8E4M3FN" in line]
    assert not any(move in line for line in touching for move in ("transpose", "pad", "concat"))


@pytest.mark.parametrize(
    ("n", "out_dtype", "rows"),
    [
        (3424, "bfloat16", 256),
        (3420, "bfloat16", 512),
        (3420, "float32", 256),
        (3421, "float32", 512),
    ],
)
def test_the_scratch_has_whole_tiles(n, out_dtype, rows):
    """And where TMA cannot address the rows of a result, room behind each class of them."""
    kernel = PaddedKernel.from_dense(randn(5, (K, n)))
    text = cuda_text(lambda x: fp8_dense(x, kernel, out_dtype=out_dtype), randn(6, (13, K)))
    (results,) = re.findall(r"custom_call @jaxfp8_dense_v1.*-> \((.*)\)", text)
    scratch = f"tensor<{rows}x1296xf8E4M3FN>, tensor<{rows}xf32>"
    assert f"tensor<13x{n}x" in results and scratch in results


class Block(nn.Module):
    """A residual block as `nn.scan` wants it."""

    @nn.compact
    def __call__(self, x, _):
        y = PaddedFP8Dense(N, activation="gelu", name="up")(x)
        return x + PaddedFP8Dense(K, name="down")(y), None


LAYERS = 3
STACKED = SHAPES | {(1296, 3424), (LAYERS, 3424, 1296), (LAYERS, 1296, 3424)}


def scan_text() -> str:
    model = nn.scan(
        Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
    )()
    x = randn(6, (8, K), jnp.bfloat16)
    params = jax.jit(model.init)(jax.random.key(0), x, None)
    text = compiled_text(lambda params, x: model.apply(params, x, None)[0], params, x)
    assert f"f8e4m3fn[{LAYERS},3424,1296]" in text
    return text


def test_a_scanned_step_moves_no_weight():
    assert moved_weights(scan_text(), STACKED) == []


def test_a_scanned_step_by_hand_moves_no_weight():
    stack = PaddedKernel.from_dense(randn(7, (LAYERS, K, K)))

    def step(x, stack):
        return jax.lax.scan(lambda x, kernel: (fp8_dense(x, kernel), None), x, stack)[0]

    text = compiled_text(step, randn(8, (8, K), jnp.bfloat16), stack)
    assert moved_weights(text, {(1296, 1296), (LAYERS, 1296, 1296)}) == []
