"""Bad input: files of a checkpoint that are damaged, missing, or lead elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_input import Case
from checkpoint_files import entries, into, join, write, write_sharded
from update_cases import weight


W = weight(20, 18)
# From a header and what follows it to a file.
Change = Callable[[dict[str, Any], bytes], bytes]


def bytes_of(name: str, change: Change, *says: str) -> Case:
    """A file whose header or length is wrong; `change` makes it from the right parts."""

    def prepare(folder: Path) -> tuple[Any, Callable[[], object]]:
        header, data = entries({"up.weight": W, "up.bias": weight(20)})
        (folder / "model.safetensors").write_bytes(change(header, data))
        return into(folder / "model.safetensors")

    return Case(name, prepare, ValueError, ("model.safetensors", *says))


def entry(
    key: str, value: Any, name: str = "up.weight"
) -> Callable[[dict[str, Any], bytes], bytes]:
    def change(header: dict[str, Any], data: bytes) -> bytes:
        return join({**header, name: {**header[name], key: value}}, data)

    return change


def index(name: str, weight_map: Any, error: type[Exception], *says: str) -> Case:
    """An index that does not go with its files: a.safetensors holds up.weight."""

    def prepare(folder: Path) -> tuple[Any, Callable[[], object]]:
        write_sharded(folder, {"a.safetensors": {"up.weight": W}, "b.safetensors": {"x": W}})
        file = folder / "model.safetensors.index.json"
        file.write_text(json.dumps({"weight_map": weight_map}))
        return into(folder)

    return Case(name, prepare, error, ("model.safetensors.index.json", *says))


def other(
    name: str,
    prepare: Callable[[Path], tuple[Any, Callable[[], object]]],
    error: type[Exception],
    *says: str,
) -> Case:
    return Case(name, prepare, error, says)


CASES = [
    bytes_of("an empty file", lambda h, d: b"", "truncated", "has 0 bytes", "again"),
    bytes_of("a file of four bytes", lambda h, d: b"\x01\0\0\0", "has 4 bytes", "takes 8"),
    bytes_of("a truncated file", lambda h, d: join(h, d)[:-7], "'up.bias'", "outside", "again"),
    bytes_of("a file cut in its header", lambda h, d: join(h, d)[:50], "truncated", "has 50 bytes"),
    bytes_of(
        "a header longer than the file",
        lambda h, d: (1 << 40).to_bytes(8, "little") + join(h, d)[8:],
        "a length of 1099511627776",
        "can follow",
    ),
    bytes_of("a pickle", lambda h, d: b"\x80\x04\x95" + bytes(90), "safetensors file"),
    bytes_of("a header that is no JSON", lambda h, d: join(b"{'up': 1}", d), "corrupt header"),
    bytes_of("a header that is no UTF-8", lambda h, d: join(b"\xff\xfe{}", d), "corrupt header"),
    bytes_of(
        "a header that nests for ever", lambda h, d: join(b"[" * 100_000, d), "corrupt header"
    ),
    bytes_of("a header that is a list", lambda h, d: join(b"[1]", d), "a list", "JSON object"),
    bytes_of(
        "a name that occurs twice",
        lambda h, d: join(b'{"up.weight": 1, "up.weight": 2}', d),
        "'up.weight' occurs twice",
    ),
    bytes_of(
        "metadata of numbers", lambda h, d: join({**h, "__metadata__": {"a": 1}}, d), "__metadata__"
    ),
    bytes_of("an unknown dtype", entry("dtype", "F4"), "'up.weight'", "'F4'", "Known are BOOL"),
    bytes_of("a dtype that is a list", entry("dtype", ["F32"]), "'up.weight'", "unknown dtype"),
    bytes_of("a shape that is no list", entry("shape", 360), "'up.weight'", "shape 360"),
    bytes_of("a negative size", entry("shape", [-20, -18]), "'up.weight'", "[-20, -18]"),
    bytes_of("a size that is a bool", entry("shape", [True, 360]), "[True, 360]"),
    bytes_of("a size beyond any memory", entry("shape", [0, 2**64]), "'up.weight'", "2^48"),
    bytes_of("too many axes", entry("shape", [1] * 70), "'up.weight'", "at most 32"),
    bytes_of("a negative offset", entry("data_offsets", [-4, 1436]), "'up.weight'", "[-4, 1436]"),
    bytes_of("one offset", entry("data_offsets", [1440]), "'up.weight'", "[1440]"),
    bytes_of("offsets the wrong way", entry("data_offsets", [1440, 0]), "'up.weight'", "-1440"),
    bytes_of(
        "bytes that contradict the shape",
        entry("shape", [20, 19]),
        "'up.weight'",
        "[20, 19] of F32, 1520 bytes",
        "span 1440",
    ),
    bytes_of(
        "offsets outside the file",
        entry("data_offsets", [9000, 9080], "up.bias"),
        "'up.bias'",
        "outside the file",
    ),
    bytes_of(
        "tensors that overlap",
        entry("data_offsets", [1436, 1516], "up.bias"),
        "'up.bias'",
        "overlaps 'up.weight'",
    ),
    bytes_of(
        "a hole between tensors",
        lambda h, d: entry("data_offsets", [1444, 1524], "up.bias")(h, d + bytes(4)),
        "'up.bias'",
        "leaves a hole after 'up.weight'",
    ),
    bytes_of(
        "bytes behind the tensors", lambda h, d: join(h, d + b"more"), "something was appended"
    ),
    bytes_of(
        "an entry with something else",
        entry("strides", [1, 2]),
        "'up.weight'",
        "nothing else",
    ),
    other(
        "a path that is not there",
        lambda folder: into(folder / "gone"),
        FileNotFoundError,
        "`path`",
        "gone",
    ),
    other(
        "a directory without safetensors",
        lambda folder: into(folder),
        FileNotFoundError,
        "holds no *.safetensors",
        "pickle",
    ),
    other(
        "a tensor in two shards",
        lambda folder: into(
            [write(folder / f"{name}.safetensors", {"x": W}).parent for name in "ab"][0]
        ),
        ValueError,
        "'x' is in two files",
        "a.safetensors and ",
        "b.safetensors",
        "Remove one",
    ),
    other(
        "a model in two layouts",
        lambda folder: into(
            [
                write(folder / f"{name}.safetensors", {f"{name}.weight": W}).parent
                for name in ("model", "consolidated")
            ][0]
        ),
        ValueError,
        "consolidated.safetensors beside model.safetensors",
        "two layouts",
        "`path`",
    ),
    index("an index that is a list", ["a"], ValueError, "`weight_map`", "['a']"),
    index(
        "an index naming a missing file",
        {"up.weight": "c.safetensors"},
        FileNotFoundError,
        "'up.weight'",
        "c.safetensors",
        "no such file",
    ),
    index(
        "an index naming a tensor that is not there",
        {"up.weight": "a.safetensors", "up.bias": "a.safetensors"},
        ValueError,
        "'up.bias' is in a.safetensors",
        "not there",
    ),
    index(
        "an index naming the wrong file",
        {"up.weight": "b.safetensors", "x": "a.safetensors"},
        ValueError,
        "'up.weight' is in b.safetensors, but it is in a.safetensors",
    ),
    *(
        index(
            f"an index that leads to {path!r}",
            {"up.weight": path},
            ValueError,
            repr(path),
            "own folder",
        )
        for path in ("../a.safetensors", "/etc/passwd", "x/../a.safetensors", r"C:\a", "..", "")
    ),
]
