"""`tune`: the kernel table's constants from measured times, and what its choices are worth."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
from table_cases import LARGE, MIDDLE, SMALL, measured, table_file

from benchmarks import _cost, _search, _table, tune
from benchmarks.__main__ import main
from benchmarks.shapes import Gemm


ROOT = Path(__file__).parents[1]


@pytest.fixture
def table(tmp_path):
    return table_file(tmp_path)


TRUE = {SMALL: (0.2, 0.4, 1.5), MIDDLE: (0.4, 0.5, 2.5)}


@pytest.fixture
def files(tmp_path, table):
    """Times that follow other constants than the table's, exactly; two shapes in both files."""
    memory = _table.read(table).memory
    contents = []
    sizes = itertools.product((16, 63, 512), ((1024, 4096), (8192, 8192), (4096, 512)))
    every = [Gemm(m, n, k) for m, (n, k) in sizes]
    for index, some in enumerate((every, every[:2])):
        rows = []
        for s in some:
            # The last file counts: of the two shapes of both, the first one's times are wrong.
            factor = 3.0 if index == 0 and s in every[:2] else 1.0
            times = {k: factor * _table.Work.of(k, memory, s).time(*c) for k, c in TRUE.items()}
            rows.append(measured(s.m, s.n, s.k, times | {"fast_gone": 0.1}))
        place = {"source_hash": str(index), "gpu": "none"}
        path = tmp_path / f"gemm-{index}.json"
        path.write_text(json.dumps({"is_gpu_number": False, "environment": place, "shapes": rows}))
        contents.append(path)
    return contents


def test_tuning_finds_the_constants_that_made_the_times(table, files, tmp_path, capsys):
    out, before = tmp_path / "out", table.read_text()
    assert main(["tune", *map(str, files), "--table", str(table), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "differ in their source_hash" in printed and "differ in their gpu" not in printed
    assert table.read_text() == before
    content = json.loads((out / "tune-cpu.json").read_text())
    small, middle, promoted = content["rows"]
    for row, true in ((small, TRUE[SMALL]), (middle, TRUE[MIDDLE])):
        assert row["shapes"] == 9 and row["deviation"] < 0.01
        # Where the memory hides a constant it is found less well.
        assert row["fitted"] == pytest.approx(true, rel=0.1)
    assert promoted["fitted"] == [0.5, 2.0, 0.0] and promoted["deviation"] is None
    assert content["choices"]["fitted shapes, fitted"]["fast"]["worst"] > 0.99
    for entry in content["faster"]:
        assert {entry["kernel"], entry["faster"]} == {SMALL, MIDDLE} and entry["gain"] > 1.02


def test_a_search_mends_a_choice(table):
    """Where two kernels are expected to take nearly the same, the times say which is better."""
    other = MIDDLE.replace("1x1", "1x2")
    rows = [_table.Row(MIDDLE, 0.5, 1.0, 2.0), _table.Row(other, 0.51, 1.0, 2.0)]
    present = _table.read(table).with_rows(rows)
    times = {Gemm(m, 4096, 4096): {MIDDLE: 11.0, other: 10.0} for m in (512, 1024, 2048)}
    assert {present.chosen(shape, "fast") for shape in times} == {MIDDLE}
    cost = _cost.Cost(times)
    found = _search.refine(present, cost.of_choices)
    assert {found.chosen(shape, "fast") for shape in times} == {other}
    assert cost.of_choices(found) == 0 < cost.of_choices(present)
    assert found == _search.rounded(found)
    # Nothing is changed where nothing is gained.
    assert _search.refine(found, cost.of_choices) == found


def test_a_cost_is_that_of_every_shapes_choice(table):
    """As `Table.chosen` has it, also of a table changed in one row or in its memory."""
    read = _table.read(table)
    sizes = itertools.product((1, 16, 300, 4096), ((1280, 3424), (4096, 14336), (28672, 4096)))
    shapes = [Gemm(m, n, k) for m, (n, k) in sizes]
    times = {
        shape: {
            row.kernel: (5 + (3 * index + 7 * place) % 11) * 1.0
            for place, row in enumerate(read.rows)
            if (index + place) % 5  # not all were timed
        }
        for index, shape in enumerate(shapes)
    }
    cost = _cost.Cost(times)
    slower = dataclasses.replace(read.rows[0], k_tile=3 * read.rows[0].k_tile)
    memory = dataclasses.replace(read.memory, multiprocessors=20)
    changed = (read.with_rows([slower, *read.rows[1:]]), dataclasses.replace(read, memory=memory))
    found = []
    for candidate in (read, *changed, read):
        expected = 0.0
        for shape, named in times.items():
            for kind in {name.split("_")[0] for name in named}:
                least = min(t for name, t in named.items() if name.startswith(kind))
                taken = named.get(candidate.chosen(shape, kind), math.nan)
                loss = _cost.UNTIMED if math.isnan(taken) else math.log(taken / least)
                expected += loss + _cost.BEYOND * max(0, loss - _cost.TOLERABLE)
        found.append(cost.of_choices(candidate))
        assert found[-1] == pytest.approx(expected)
    assert found[0] == found[3] and len(set(found)) == 3


def test_of_choices_that_cost_the_same_the_one_that_explains_the_times_is_better(table):
    read = _table.read(table)
    shape = Gemm(512, 4096, 4096)
    taken = _table.expected_time(
        next(r for r in read.rows if r.kernel == MIDDLE), read.memory, shape
    )
    times = {shape: {MIDDLE: taken, SMALL: 2 * taken}}
    cost = _cost.Cost(times)
    wrong = read.with_rows(
        [
            dataclasses.replace(row, k_tile=2 * row.k_tile)
            for row in read.rows
            if row.kernel == MIDDLE
        ]
    )
    right = read.with_rows([row for row in read.rows if row.kernel == MIDDLE])
    assert cost.of_choices(right) == cost.of_choices(wrong) == cost.loss(right) == 0
    assert cost.loss(wrong) > _cost.EXPLAINED * 0.3  # 0.69^2, were it all of the time
    # A kernel that takes twice the best one's time weighs an eighth, and so its square a 64th.
    off = _table.expected_time(read.rows[0], read.memory, shape) / (2 * taken)
    expected = _cost.EXPLAINED * (math.log(off) / 8) ** 2
    assert cost.loss(read) - cost.of_choices(read) == pytest.approx(expected)


def test_a_kernel_that_was_not_timed_is_no_good_choice(table):
    shape = Gemm(16, 4096, 4096)
    cost = _cost.Cost({shape: {MIDDLE: 10.0, LARGE: 10.1}})
    present = _table.read(table)
    assert present.chosen(shape, "fast") == SMALL
    assert cost.of_choices(present) > 0.3
    timed = present.with_rows([row for row in present.rows if row.kernel != SMALL])
    assert cost.of_choices(timed) < 0.1


def test_shapes_held_out_are_not_fitted_to(table, files, tmp_path):
    wrong = json.loads(files[0].read_text())
    for row in wrong["shapes"]:
        row["microseconds"] = {name: 7.0 for name in row["microseconds"]}
    check = tmp_path / "check.json"
    check.write_text(json.dumps(wrong))
    contents = []
    for index, extra in enumerate(([], ["--check", str(check)])):
        out = tmp_path / str(index)
        options = ["--table", str(table), "--out", str(out), *extra]
        assert main(["tune", *map(str, files), *options]) == 0
        contents.append(json.loads((out / "tune-cpu.json").read_text()))
    assert contents[0]["rows"] == contents[1]["rows"]
    assert "other shapes, table" not in contents[0]["choices"]
    other = contents[1]["choices"]["other shapes, table"]["fast"]
    assert math.isclose(other["geometric_mean"], 1.0) and other["shapes"] == 9


def test_files_without_kernels_say_nothing_of_the_table(table, files, tmp_path):
    plain = json.loads(files[0].read_text())
    for row in plain["shapes"]:
        row["microseconds"] = {"ours": 1.0, "cublaslt": 1.1}
    files[0].write_text(json.dumps(plain))
    assert tune.times_of(_table.read(table), [plain]) == {}
    assert main(["tune", str(files[0]), "--table", str(table), "--out", str(tmp_path / "out")]) == 1


def test_the_committed_times_are_what_the_table_was_made_from(tmp_path):
    results = ROOT / "benchmarks" / "results"
    made_from = ["kernel-times", "kernel-times-promoted"]
    held_out = ["kernel-times-held-out", "kernel-times-promoted-held-out"]
    files = [str(results / f"{name}.json") for name in made_from]
    check = ["--check", *(str(results / f"{name}.json") for name in held_out)]
    # What the choices are worth in geometric mean and at worst, of the fitted shapes and of others:
    # those of another table must be as good.
    worth = {
        "fast": ((0.9965, 0.928), (0.9905, 0.884)),
        "promoted": ((0.9975, 0.932), (0.9985, 0.98)),
    }
    for kind, least in worth.items():
        out = tmp_path / kind
        assert main(["tune", "--only", kind, *files, *check, "--out", str(out)]) == 0
        content = json.loads(next(out.glob("tune*.json")).read_text())
        assert {row["kernel"].split("_")[0] for row in content["rows"]} == {kind}
        assert content["memory"]["searched"] == content["memory"]["written"]
        choices = {name: found[kind] for name, found in content["choices"].items()}
        table, searched = (choices[f"fitted shapes, {which}"] for which in ("table", "searched"))
        # Fast rows came with a search of the memory's constants too, which ends elsewhere.
        assert table["geometric_mean"] > searched["geometric_mean"] - 0.002
        for where, (mean, worst) in zip(("fitted shapes", "other shapes"), least, strict=True):
            found = choices[f"{where}, table"]
            assert found["geometric_mean"] > mean and found["worst"] > worst
