"""The tolerances themselves: they cover a tensor core as described, and no wrong result.

The tensor core is simulated in float64 from its description (see `helpers.sum_error`), so that
the bounds are known to hold, and to be tight, before any GPU has run.
"""

import numpy as np
import pytest
from helpers import Product, sum_error

from jaxfp8 import quantize


ROWS = 2048


def cut(v, quantum):
    return np.trunc(v / quantum) * quantum


def quantum_of(v):
    return 2.0 ** (np.floor(np.log2(np.where(v > 0, v, 1))) - 13)


def mma(accumulator, products):
    """32 products for each row, added in fixed point 13 bits below the largest of the 33."""
    largest = np.maximum(np.abs(accumulator), np.abs(products).max(-1))
    quantum = quantum_of(largest)
    total = cut(accumulator, quantum) + cut(products, quantum[:, None]).sum(-1)
    return cut(total, quantum_of(np.abs(total)))


def simulate(products, kind):
    """Row sums of `[rows, K]` products as the fast and the promoted kernels form them."""
    every = products.shape[1] if kind == "fast" else 128
    total = np.zeros(len(products), np.float32)
    for group in range(0, products.shape[1], every):
        accumulator = np.zeros(len(products))
        for k in range(group, min(group + every, products.shape[1]), 32):
            accumulator = mma(accumulator, products[:, k : k + 32])
        total = total + accumulator.astype(np.float32)
    return total.astype(np.float64)


def products_of(k, coherent=False, seed=0):
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(2, ROWS, k)).astype(np.float32)
    if coherent:
        x, w = np.abs(x), np.abs(w)
    qx, qw = (np.asarray(quantize(a, axis=-1)[0], np.float64) for a in (x, w))
    return qx * qw


@pytest.mark.parametrize("k", [32, 128, 1024, 4096])
@pytest.mark.parametrize("kind", ["fast", "promoted"])
def test_bounds_hold_and_are_no_looser_than_need_be(kind, k):
    products = products_of(k)
    want, magnitude = products.sum(-1), np.abs(products).sum(-1)
    error = np.abs(simulate(products, kind) - want)
    c, norm = sum_error(k, kind)
    relative = np.linalg.norm(error) / np.linalg.norm(want)
    assert (error <= c * magnitude).all()
    assert relative <= norm
    if k >= 128:
        # Within a factor of 4 in norm; the elementwise bound, which must also hold for the
        # largest of 10^8 elements, within 16 of the largest of these.
        assert relative >= norm / 4
        assert (error / magnitude).max() >= c / 16


def test_coherent_sums_tell_fast_from_promoted():
    # What test_gpu_numerics.py asks of the GPU; an H200 gave 3.4e-2 for a Gram matrix.
    products = products_of(4096, coherent=True)
    want = products.sum(-1)
    relative = {
        kind: np.linalg.norm(simulate(products, kind) - want) / np.linalg.norm(want)
        for kind in ("fast", "promoted")
    }
    assert relative["promoted"] < 1e-3
    assert 2e-2 < relative["fast"] < 2e-1


def drop_one_k(y, x, w):
    return y - np.outer(x[:, 7], w[:, 7])


def drop_last_16(y, x, w):
    return x[:, :-16] @ w[:, :-16].T


def shift_channels(y, x, w):
    return np.roll(y, 1, axis=1)


def swap_two_rows(y, x, w):
    y = y.copy()
    y[[2, 3]] = y[[3, 2]]
    return y


def round_twice(y, x, w):
    return (y * (1 + 2.0**-8)).astype(np.float32)


def scale_of_another_row(y, x, w):
    y = y.copy()
    y[5] *= 1.02
    return y


@pytest.mark.parametrize("kind", ["fast", "promoted", "float32"])
@pytest.mark.parametrize(
    "fault",
    [drop_one_k, drop_last_16, shift_channels, swap_two_rows, round_twice, scale_of_another_row],
)
def test_wrong_results_are_refused(kind, fault):
    rng = np.random.default_rng(1)
    shape = (64, 512), (96, 512)
    qx, qw = (quantize(rng.normal(size=s).astype(np.float32), axis=-1)[0] for s in shape)
    x, w = (np.asarray(q, np.float64) for q in (qx, qw))
    product = Product.of(qx, qw)
    right = (x @ w.T).astype(np.float32)
    product.check(right, 1.0, 1.0, kind=kind)
    with pytest.raises(AssertionError, match="off"):
        product.check(np.asarray(fault(x @ w.T, x, w), np.float32), 1.0, 1.0, kind=kind)
