"""Ten thousand reloads: nothing recompiles, moves, leaks or decays; and readers of the old tree."""

import concurrent.futures
import multiprocessing
import os
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from test_reload import count_compilations, identity_of
from update_cases import addresses, assert_same_bits, weight

from jaxfp8 import DenseWeight, FP8Weight, PaddedKernel, quantize, reload_params, reload_stream


K, N = 50, 115  # Both padded, to 64 and 128: a kernel of 8 KiB.
# From the first tenth on the process grew by 0.26 MB at most (4 runs, jax 0.9.1 and 0.10.2). A
# kernel lost at every reload would be 80 MB; the bound is 0.5 kB at each of 9000.
RSS_BOUND = 4.5e6


def served() -> dict:
    kernel = PaddedKernel.from_dense(weight(K, N, seed=9))
    return {"kernel": kernel, "bias": jnp.zeros(N)}


def forms() -> list[dict]:
    """Other weights in every form: host and device, both layouts, float and quantized."""
    w, b = [weight(K, N, seed=i) for i in range(4)], [weight(N, seed=i) for i in range(4)]
    value, scale = quantize(w[3].T, axis=-1, keepdims=False)
    return [
        {"kernel": w[0], "bias": b[0]},
        {"kernel": jnp.asarray(w[1], jnp.bfloat16), "bias": jnp.asarray(b[1])},
        {"kernel": DenseWeight(jnp.asarray(w[2].T), "out_in"), "bias": jnp.asarray(b[2])},
        {"kernel": FP8Weight(value, scale, "out_in"), "bias": b[3]},
    ]


def rss() -> int:
    """The memory of this process that is in RAM, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@jax.jit
def count_bad_padding(params, count):
    """A served function as well: it reads every leaf. Nothing is fetched, so nothing waits."""
    kernel = params["kernel"]
    codes = jax.lax.bitcast_convert_type(kernel.qvalue, jnp.uint8)
    return (
        count
        + jnp.count_nonzero(codes[N:])
        + jnp.count_nonzero(codes[:, K:])
        + jnp.count_nonzero(kernel.scale[N:] != 1)
        + 0 * params["bias"].astype(jnp.int32).sum()
    )


def reload_often(count: int, reload) -> None:
    params, loaded = served(), forms()
    where, what, expected = addresses(params), identity_of(params), []
    bad = jnp.int32(0)
    for tree in loaded:
        params = reload(params, tree)
        bad = count_bad_padding(params, bad)
        expected.append(jax.tree.map(jnp.copy, params))
    assert identity_of(params) == what
    old, memory, arrays = params, 0, 0

    def look(turn: int) -> None:
        assert int(bad) == 0
        assert identity_of(params) == what
        assert_same_bits(params, expected[turn % 4])
        with pytest.raises((RuntimeError, ValueError), match="deleted"):
            count_bad_padding(old, bad)

    params = reload(params, loaded[3])
    look(3)  # Whatever it compiles is compiled now.
    programs = count_bad_padding._cache_size()
    with count_compilations() as compiled:
        for turn in range(count):
            old, params = params, reload(params, loaded[turn % 4])
            bad = count_bad_padding(params, bad)
            assert addresses(params) == where
            if (turn + 1) % (count // 10) == 0:
                look(turn)
                arrays, memory = arrays or len(jax.live_arrays()), memory or rss()
                assert len(jax.live_arrays()) == arrays
    assert compiled == [] and count_bad_padding._cache_size() == programs
    grew = rss() - memory
    assert grew <= RSS_BOUND, f"the process grew by {grew} bytes"


def by_stream(params, loaded):
    with reload_stream(params) as stream:
        stream.put("kernel", loaded["kernel"])
        stream.put("bias", loaded["bias"])
        return stream.finish()


def _no_preallocation() -> None:
    # A GPU's memory may be the parent's but for a share.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def in_a_process_of_its_own(count: int, reload) -> None:
    """`reload_often` where all that the process grows by is its own.

    Where a thousand other tests have run, the collector comes late and malloc gives back what it
    likes: such a process once grew by 15 MB here.
    """
    with concurrent.futures.ProcessPoolExecutor(
        max_workers=1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_no_preallocation,
    ) as child:
        child.submit(reload_often, count, reload).result()


def test_ten_thousand_reloads():
    in_a_process_of_its_own(10_000, reload_params)


def test_two_thousand_streams():
    in_a_process_of_its_own(2_000, by_stream)


@pytest.mark.gpu
@pytest.mark.parametrize("reload", [reload_params, by_stream])
def test_a_thousand_reloads_on_a_gpu(reload):
    in_a_process_of_its_own(1_000, reload)


def test_a_reader_never_sees_a_mixture():
    """One thread reloads, another reads whatever tree it finds: whole, or JAX's error.

    Every leaf of a tree holds its version, so that a mixture would be seen.
    """
    leaves = {f"leaf_{i}": jnp.zeros(2000) for i in range(8)}

    @jax.jit
    def read(tree):
        values = jnp.stack([leaf for leaf in tree.values()])
        return values.min(), values.max()

    held, results, failures, done = [leaves], [], [], threading.Event()

    def reader() -> None:
        while not done.is_set():
            tree = held[0]
            try:
                results.append(tuple(map(float, read(tree))))
            except (RuntimeError, ValueError) as error:
                failures.append(str(error))
                done.wait(1e-3)

    read(leaves)
    thread = threading.Thread(target=reader)
    thread.start()
    try:
        for version in range(1, 301):
            fresh = jnp.full(2000, version, jnp.float32)
            held[0] = reload_params(held[0], dict.fromkeys(leaves, fresh))
    finally:
        done.set()
        thread.join()
    assert results or failures, "the reader never came to read"
    results.append(tuple(map(float, read(held[0]))))
    assert results[-1] == (300, 300)
    assert all(low == high for low, high in results)
    assert all("deleted" in failure or "donated" in failure for failure in failures), failures[:3]
