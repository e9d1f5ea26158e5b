"""The benchmark of a load's memory, from end to end on small layers."""

import json

from benchmarks.__main__ import main as run


def test_it_measures_both_trees_and_the_weights_are_right(tmp_path, capsys):
    options = ["--layers", "2", "--divisor", "8", "--loads", "2", "--out", str(tmp_path)]
    assert run(["checkpoint", *options]) == 0
    (file,) = tmp_path.glob("checkpoint-cpu.json")
    content = json.loads(file.read_text())
    rows = content["rows"]
    assert [(row["tree"], row["load"]) for row in rows] == [
        (tree, load) for tree in ("branches", "stacked") for load in (0, 1)
    ]
    gate_up = 2 * 2 * (11004 // 8) * (4096 // 8)
    for row in rows:
        assert row["largest_layer"] == gate_up and not row["wrong"]
        assert 0.9 * gate_up < row["host_arrays"] < 1.1 * gate_up
        assert row["anonymous"] > 0 and row["process"] > row["served"]
    assert "GB of bfloat16 in 2 files" in capsys.readouterr().out
