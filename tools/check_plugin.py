"""Check the plugin library named on the command line, on a machine without a GPU.

It must load, export its handlers and nothing else, and need no CUDA library.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys

from jaxfp8 import _cutlass


def check(path: str) -> list[str]:
    """What is wrong with the library at `path`; an empty list if nothing is."""
    library = ctypes.CDLL(path)
    handlers = [f"{target}_execute" for target in _cutlass.TARGETS]
    faults = [
        f"it does not export {name}"
        for name in [*handlers, "jaxfp8_build_info"]
        if not hasattr(library, name)
    ]
    if not faults:
        library.jaxfp8_build_info.restype = ctypes.c_char_p
        build = json.loads(library.jaxfp8_build_info())
        print(json.dumps(build, indent=2))
        # The environment's jaxlib is the oldest supported one, or newer: the library must load.
        if fault := _cutlass.check_ffi_version(build["ffi"], _cutlass.jaxlib_ffi_version()):
            faults.append(fault)
    dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic.stdout)
    print("needs", *needed)
    faults += [f"it is linked to {name}" for name in needed if re.match("libcu|libnv", name)]
    symbols = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True)
    for kind, name in re.findall(r"\b([A-Za-z]) (\S+)$", symbols.stdout, re.MULTILINE):
        if kind == "U" and re.match("cu[A-Z]|cuda[A-Z]", name):
            faults.append(f"it leaves {name} to be found at run time")
        if kind in "TDB" and not name.startswith("jaxfp8_"):
            faults.append(f"it exports {name}, which is not its own")
    return faults


if __name__ == "__main__":
    found = check(sys.argv[1])
    print("\n".join(f"{sys.argv[1]}: {fault}" for fault in found) or "the plugin library is sound")
    sys.exit(bool(found))
