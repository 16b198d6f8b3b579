"""The kernels for older CPUs, which this machine would not choose, compute the same."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).with_name("test_all_ops.py")
PROGRAM = """
import sys, pytest
from rtpurbo.environment import environment
code = pytest.main(sys.argv[1:])
print("ran on", environment()["cpu_capability"])
sys.exit(code)
"""


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"])
def test_kernels_for_another_cpu(capability):
    if capability != "DEFAULT" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("only x86 has it")
    arguments = ["-q", "-p", "no:cacheprovider", str(TESTS), "-k", "equals_the_reference"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability.lower()},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.endswith(f"ran on {capability}\n")
