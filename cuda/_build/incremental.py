"""Build the plugin's library in place and again only where sources changed, without a wheel.

    python cuda/_build/incremental.py              # build/cuda/libjaxfp8_cuda13.so
    JAXFP8_LIBRARY=build/cuda/libjaxfp8_cuda13.so python -m jaxfp8

The headers and, if need be, the compiler go into a virtual environment beside the build, unless
the interpreter that runs this has them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

import toolchain


LIBRARY = "libjaxfp8_cuda13.so"


def build_environment(directory: Path) -> Path:
    """The interpreter of a virtual environment with the build requirements, made once."""
    requirements = [*toolchain.build_requirements()[1:], *toolchain.compiler_requirements()]
    requirements += [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    python, stamp = directory / "bin" / "python", directory / "requirements.txt"
    wanted = "\n".join(requirements)
    if not (stamp.is_file() and stamp.read_text() == wanted):
        toolchain.say(f"installing {', '.join(requirements)} into {directory}")
        venv.create(directory, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *requirements], check=True)
        stamp.write_text(wanted)
    return python


def compile_library(build_dir: Path, target: str, defines: list[str]) -> Path:
    """Configure, and compile what is out of date."""
    defined = toolchain.cmake_defines()
    found = [f"-D{key}={value}" for key, value in defined.items()]
    cache = build_dir / "CMakeCache.txt"
    compiler = re.compile(
        rf"^CMAKE_CUDA_COMPILER:\w+={re.escape(defined['CMAKE_CUDA_COMPILER'])}$", re.MULTILINE
    )
    if cache.is_file() and not compiler.search(cache.read_text()):
        # CMake would begin again without the -D of this call.
        cache.unlink()
    tools = Path(sys.executable).parent
    path = os.environ["PATH"] + os.pathsep + str(tools)
    cmake = shutil.which("cmake", path=path) or "cmake"
    environment = {**os.environ, "PATH": path}
    start = time.monotonic()
    configure = [cmake, "-S", str(toolchain.SOURCE_DIR), "-B", str(build_dir), "-G", "Ninja"]
    subprocess.run(
        [*configure, "-DCMAKE_BUILD_TYPE=Release", *found, *defines], env=environment, check=True
    )
    subprocess.run([cmake, "--build", build_dir, "--target", target], env=environment, check=True)
    toolchain.say(f"{target} in {build_dir} is up to date after {time.monotonic() - start:.0f} s")
    return build_dir / LIBRARY


def main() -> None:
    """Command line; arguments it does not know (`-D...`) go to CMake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build-dir", type=Path, default=Path("build/cuda"))
    parser.add_argument("--target", default=LIBRARY, help="what to build: a target of CMake's")
    parser.add_argument("--copy-to", type=Path, help="also copy the library to this path")
    arguments, defines = parser.parse_known_args()
    build_dir = arguments.build_dir.resolve()
    if not toolchain.headers_installed():
        python = build_environment(build_dir.parent / f"{build_dir.name}-env")
        os.execv(python, [str(python), *sys.argv])
    try:
        library = compile_library(build_dir, arguments.target, defines)
    except subprocess.CalledProcessError as error:  # CMake and Ninja have said why.
        sys.exit(error.returncode)
    if arguments.copy_to:
        shutil.copy(library, arguments.copy_to)


if __name__ == "__main__":
    main()
