"""`import rtpurbo` registers operators and changes nothing else."""

import json
import subprocess
import sys

PROBE = """
import json, logging, os, random, signal, sys, warnings
import numpy, torch, transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def state():
    return {
        "attention functions": sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
        "mask functions": sorted(ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "torch seed": torch.initial_seed(),
        "random numbers": [hash(random.getstate()), numpy.random.get_state()[2]],
        "logging": [logging.root.level, len(logging.root.handlers), logging.root.disabled],
        "transformers logging": transformers.logging.get_verbosity(),
        "warning filters": len(warnings.filters),
        "environment": dict(os.environ),
        "search path": list(sys.path),
        "folder": os.getcwd(),
        "interrupt": str(signal.getsignal(signal.SIGINT)),
        "excepthook": str(sys.excepthook),
    }

loaded = set(sys.modules)
before = state()
import rtpurbo
after = state()
optional = ["accelerate", "peft", "datasets", "matplotlib", "rich", "typer", "gguf"]
print(json.dumps([
    {name: [before[name], after[name]] for name in before if before[name] != after[name]},
    [name for name in optional if name in sys.modules and name not in loaded],
]))
"""


def test_import_changes_nothing_global():
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    changed, optional_packages = json.loads(done.stdout)
    assert changed == {}
    assert optional_packages == []
