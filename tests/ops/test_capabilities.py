"""The kernels for older CPUs, which this machine would not choose, compute the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).with_name("test_all_ops.py")


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_kernels_for_another_cpu(capability):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    done = subprocess.run(
        [*command, "-k", "equals_the_reference"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
    )
    assert done.returncode == 0, done.stdout[-4000:]
