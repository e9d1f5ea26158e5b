"""compute-sanitizer finds no access outside of a buffer and no race, over every kernel."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import jaxfp8


pytestmark = pytest.mark.gpu
SCRIPT = Path(__file__).with_name("gpu_memcheck.py")
FOUND = 99


def sanitizer() -> str:
    from_the_package_index = os.path.join(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin")
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", from_the_package_index]
    path = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    assert path is not None, (
        f"compute-sanitizer is in none of {places}. It comes with the CUDA toolkit, or with "
        "`pip install nvidia-cuda-sanitizer-api`."
    )
    return path


@pytest.mark.parametrize(
    ("tool", "summary"),
    [("memcheck", "ERROR SUMMARY: 0 errors"), ("racecheck", "RACECHECK SUMMARY: 0 hazards")],
)
def test_the_sanitizer_finds_nothing(tool, summary):
    root = Path(jaxfp8.__file__).parents[1]
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
    }
    command = [sanitizer(), "--tool", tool, "--error-exitcode", str(FOUND)]
    # Only accesses count: XLA itself asks the driver questions that are answered with an error.
    command += ["--report-api-errors", "no", sys.executable, str(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"exit code {done.returncode}:\n{output[-8000:]}"
    assert "OK " in done.stdout and summary in output, output[-8000:]
