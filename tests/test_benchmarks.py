"""The arithmetic of the benchmarks: bounds, profiles, programs, tables."""

import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from benchmarks import (
    _clocks,
    _graphs,
    _hlo,
    _plot,
    _report,
    _trace,
    gemm,
    shapes,
)
from benchmarks.shapes import Gemm


ROOT = str(Path(__file__).parents[1])


def test_the_grid_and_its_bound():
    grid = [Gemm(m, n, k) for n, k in shapes.GEMM_WEIGHTS for m in shapes.GEMM_ROWS]
    assert len(set(grid)) == 60
    h200 = shapes.peak_of("NVIDIA H200")
    # Decoding waits for the weight, prefill for the tensor cores.
    assert Gemm(1, 4096, 4096).bound(h200) == pytest.approx((4096**2 + 28676) / 4.8e12)
    assert Gemm(8192, 8192, 8192).bound(h200) == pytest.approx(2 * 8192**3 / 1979e12)
    assert Gemm.parse("16x64x32") == Gemm(16, 64, 32)
    for wrong in ("16x64", "16x60x32", "0x64x32"):
        with pytest.raises(ValueError, match="multiples of 16"):
            Gemm.parse(wrong)


def test_weights_are_rotated_past_the_cache():
    for n, k in shapes.GEMM_WEIGHTS:
        assert shapes.copies_past_cache(n * k) * n * k >= 3 * 60e6
    assert shapes.copies_past_cache(28672 * 4096) == 2
    # 0.6 ms in a graph, twenty launches and every copy where they are short, four where long.
    assert shapes.launches_for(4e-6, copies=42) == 42
    assert shapes.launches_for(7e-6, copies=11) == 20
    assert shapes.launches_for(100e-6, copies=2) == 6
    assert shapes.launches_for(2e-3, copies=2) == 4


@pytest.mark.parametrize(
    ("name", "bandwidth", "known"),
    [
        ("NVIDIA H200", 4.8e12, True),
        ("NVIDIA GH200 480GB", 4.0e12, True),
        ("NVIDIA H100 80GB HBM3", 3.35e12, True),
        ("NVIDIA H100 PCIe", 2.0e12, True),
        ("Something else", 4.8e12, False),
    ],
)
def test_the_peak_is_the_gpus_own(name, bandwidth, known):
    peak = shapes.peak_of(name)
    assert (peak.bandwidth, peak.known) == (bandwidth, known)


def test_ratios_compare_like_with_like():
    seconds = {
        "ours": [1.0, 1.0],
        "cublaslt": [0.9, 1.1],
        "ours_promoted": [2.0, 2.0],
        "cublaslt_exact": [3.0, 3.0],
        "kernel fast_a": [4.0, 4.0],
        "kernel promoted_b": [1.0, 1.0],
    }
    assert gemm.ratios(seconds) == pytest.approx(
        {
            "cublaslt": 1.0,
            "ours_promoted": 2.0,
            "cublaslt_exact": 1.5,
            "kernel fast_a": 4.0,
            "kernel promoted_b": 0.5,
        }
    )
    assert gemm.ratios({"cublaslt": [1.0]}) == {}  # ours was wrong, and not timed


def test_the_summary_names_the_worst_shape():
    rows = [
        {"m": m, "n": 64, "k": 32, "ratios": r}
        for m, r in ((1, {"cublaslt": 4.0}), (16, {"cublaslt": 0.25}), (32, {}))
    ]
    assert gemm.summarise(rows) == {
        "cublaslt": {
            "geometric_mean": pytest.approx(1.0),
            "worst": 0.25,
            "worst_shape": "16x64x32",
            "shapes": 2,
        }
    }


def event(name, start, duration, **stats):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=stats.items())


def profile(lines, host=()):
    lines = [SimpleNamespace(name=name, events=events) for name, events in lines.items()]
    threads = [SimpleNamespace(name="python", events=list(host))]
    planes = [SimpleNamespace(name="/device:GPU:0", lines=lines)]
    return SimpleNamespace(planes=[*planes, SimpleNamespace(name="/host:CPU", lines=threads)])


def test_busy_time_is_the_union_over_streams_and_bursts_are_told_apart():
    ms = 1e6
    first = [event("gemm", 0, 3 * ms), event("quantize", 4 * ms, ms)]
    overlapping = [event("gemm", 2 * ms, 3 * ms)]  # on another stream, launched dependent
    later = [event("gemm", 40 * ms, 2 * ms)]
    modules = [event("jit_stack", 0, 100 * ms)]
    events = _trace.device_events(
        profile({"Stream #1(Compute)": later + first, "Stream #2": overlapping, "XLA": modules})
    )
    groups = [_trace.busy(group) for group in _trace.split(events, pause=0.02)]
    assert [g.seconds for g in groups] == pytest.approx([5e-3, 2e-3])
    assert dict(groups[0].kernels) == {"gemm": 2, "quantize": 1}


def test_kernels_of_graphs_and_what_the_host_says_of_them():
    ms = 1e6
    kernels = [event("gemm", 5 * ms, ms, cuda_graph_id=7), event("copy", 6 * ms, ms)]
    kernels += [event("gemm", 50 * ms, ms, cuda_graph_id=0)]
    host = [
        event("cuGraphLaunch (CudaGraph:7)", 4 * ms, 10),
        event("command_buffer::update", 3 * ms, 10),
        event("command_buffer::execute", 4 * ms, 10),
        event("WARNING: CommandBuffer disabled when profiling", 49 * ms, 10),
        event("cuGraphLaunch", 90 * ms, 10),  # nothing ran after it
    ]
    made = profile({"Stream #1": kernels}, host)
    groups = _trace.split(_trace.device_events(made, graphs=True), pause=0.02)
    assert [_trace.busy(group).in_graphs for group in groups] == [1, 0]
    assert not any(event.in_graph for event in _trace.device_events(made))
    marks = _trace.assign(_trace.host_marks(made), groups)
    assert marks == [{"launched": 1, "updated": 1}, {"not used in a profile": 1}]


def test_kernels_whose_names_begin_alike_are_told_apart_or_added():
    """CUTLASS's templates: the kernels of two layers differ behind thousands of characters."""
    head = "k" * 3000
    first, second = head + "a" * 200, head + "b" * 200
    third = head + "c" + "a" * 199
    kernels = _trace.collections.Counter({first: 6, second: 6, third: 6})
    times = {first: 3e-3, second: 2e-3, third: 1e-3}
    profile = _trace.Busy(6e-3, kernels, times)
    clocked = _clocks.Clocked({}, {"ours": [profile]}, {"ours": 2})
    found = clocked.largest("ours")
    assert sorted(round(row["microseconds"]) for row in found.values()) == [333, 667]
    assert sum(row["launches"] for row in found.values()) == 3


def test_both_clocks_count_by_parts_of_a_call(monkeypatch):
    kernels = {"ours": {"gemm": 6 * _clocks.TRACE_CALLS}, "peer": {"copy": 3 * _clocks.TRACE_CALLS}}

    def busy(name, seconds):
        counted = _trace.collections.Counter(kernels[name])
        marks = _trace.collections.Counter(updated=_clocks.TRACE_CALLS)
        spent = dict.fromkeys(counted, seconds)
        return _trace.Busy(seconds, counted, spent, counted["gemm"] // 2, marks)

    seconds = {"ours": 1e-3 * _clocks.TRACE_CALLS, "peer": 3e-3 * _clocks.TRACE_CALLS}
    profiles = {name: [busy(name, s)] * _clocks.TRACE_ROUNDS for name, s in seconds.items()}
    monkeypatch.setattr(_trace, "measure_busy", lambda *arguments, **options: profiles)
    monkeypatch.setattr(_clocks, "WALL_READING_SECONDS", 1e-4)
    calls = {"ours": lambda: 0, "peer": lambda: 0}
    clocked = _clocks.measure(calls, {"ours": 2, "peer": 1}, rounds=3, trace=True)
    assert clocked.microseconds("ours")["busy"] == pytest.approx(500)
    assert clocked.ratio("peer", "ours")["busy"] == pytest.approx(6)
    assert (clocked.kernels("ours"), clocked.kernels("peer")) == (3, 3)
    assert (clocked.in_graphs("ours"), clocked.in_graphs("peer")) == (0.5, 0)
    assert clocked.marks("ours")["updated"] == 1 and clocked.marks("ours")["launched"] == 0
    assert clocked.largest("ours")["gemm"] == {"launches": 3, "microseconds": pytest.approx(500)}
    alone = _clocks.measure(calls, {"ours": 2, "peer": 1}, rounds=3, trace=False)
    assert set(alone.microseconds("ours")) == {"wall"}
    both = _clocks.measure(calls, {"ours": 2, "peer": 1}, rounds=3, trace=False, dropped=True)
    assert set(both.microseconds("ours")) == set(both.ratio("peer", "ours")) == {"wall", "dropped"}
    assert alone.kernels("ours") is alone.in_graphs("ours") is alone.marks("ours") is None


def test_whether_graphs_are_used_in_a_word():
    unused = {"launched": 0.0, "updated": 0.0, "not used in a profile": 0.0}
    assert _graphs.captured(0.75, unused, 0) == "75%"
    assert _graphs.captured(0.0, unused | {"not used in a profile": 3.0}, 0) == "not in profiles"
    assert _graphs.captured(0.0, unused, 2) == "in the program"
    assert _graphs.captured(0.0, unused, 0) == "no"
    assert _graphs.captured(None, None, 0) == "-"
    text = "ROOT %call.4 = bf16[5,48]{1,0} call(%p), to_apply=%command_buffer.1, metadata={}"
    assert _hlo.command_buffers(text) == 1


def test_rounds_of_a_profile_go_to_their_contestants(monkeypatch):
    def fake(runs, calls, pause, graphs):
        # Each burst is as long as the number its contestant gives.
        return [_trace.Event("kernel", i * 1e9, i * 1e9 + run()) for i, run in enumerate(runs)]

    monkeypatch.setattr(_trace, "_profile", fake)
    busy = _trace.measure_busy({"a": lambda: 1e6, "b": lambda: 7e6}, rounds=3, calls=1)
    assert [b.seconds for b in busy["a"]] == pytest.approx([1e-3] * 3)
    assert [b.seconds for b in busy["b"]] == pytest.approx([7e-3] * 3)
    monkeypatch.setattr(_trace, "_profile", lambda *arguments: fake(*arguments)[1:])
    with pytest.raises(RuntimeError, match="5 separate bursts .* 6 contestants"):
        _trace.measure_busy({"a": lambda: 1e6, "b": lambda: 7e6}, rounds=3, calls=1)


@pytest.mark.filterwarnings("default")  # the profiler's own
def test_a_profile_without_gpu_streams_is_an_error():
    work = jax.jit(lambda: jnp.ones(4))
    if jax.default_backend() == "cpu":
        with pytest.raises(RuntimeError, match="no event on a GPU stream"):
            _trace.measure_busy({"work": work}, rounds=1, calls=1)
    else:
        assert _trace.measure_busy({"work": work}, rounds=1, calls=1)["work"][0].seconds > 0


def test_an_fp8_weight_that_is_moved_is_seen_in_the_program():
    text = """
  %p = f8e4m3fn[48,32]{1,0} parameter(0)
  %b = f8e4m3fn[32,48]{1,0} bitcast(%s)
  %c.1 = (bf16[5,48]{1,0}, f8e4m3fn[48,32]{1,0}) custom-call(%p), custom_call_target="ours_v1"
  %t = f8e4m3fn[32,48]{1,0} transpose(%p), dimensions={1,0}
  %s = f8e4m3fn[1,48,32]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%slice
  %x = f8e4m3fn[5,32]{1,0} convert(%a)
  %c.2 = bf16[5,48]{1,0} custom-call(%q), custom_call_target="ours_v1"
"""
    assert _hlo.read(text, [(20, 44)]) == {
        "custom_calls": {"ours_v1": 2},
        "operations_on_fp8_weights": {"transpose": 1, "fusion": 1},
    }


def test_pictures_hold_what_they_are_given(tmp_path):
    rows = [{"m": m, "n": 64, "k": 32, "ratios": {"bf16": 1.5}, "bound_share": 0.5} for m in (1, 8)]
    assert [_plot.grid_value(rows[0], panel) for panel in ("bf16", "share", "rowwise")] == [
        1.5,
        0.5,
        None,
    ]
    path = _plot.heat_map(rows, "title", tmp_path / "grid.png")
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")
    lines = {"ours": [(64.0, 1e-3), (128.0, 2e-3)]}
    path = _plot.curves({"a": lines, "b": lines}, 2, "K", "error", "title", tmp_path / "lines.png")
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")


def test_plain_text_where_rich_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    _report.print_table("Title", ["M", "x\ncuBLASLt"], [["1", ("1.05", "green")], ["128", "0.9"]])
    title, *lines = capsys.readouterr().out.strip().splitlines()
    assert title.startswith("Title") and "pip install rich" in title
    assert lines == ["  M  x cuBLASLt", "  1        1.05", "128         0.9"]


def test_the_source_hash_is_of_names_and_contents(tmp_path, monkeypatch):
    source = tmp_path / "cuda" / "src" / "table.h"
    source.parent.mkdir(parents=True)
    monkeypatch.setattr(_report, "ROOT", tmp_path)
    hashes = []
    for content in ("a row", "another row", "a row"):
        source.write_text(content)
        hashes.append(_report.source_hash())
    assert hashes[0] == hashes[2] != hashes[1]
