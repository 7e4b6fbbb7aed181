"""The optimiser that DeepSpeed compiles as a run starts on a GPU: by its own builder, for GPUs that are not here."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from fixtures.launching import environment

from mmr1_ds.preflight.machine import use_own_nvcc

BUILD = """
import sys, torch
torch.cuda.is_available = lambda: True  # or DeepSpeed leaves the kernels out
from deepspeed.ops.op_builder import FusedAdamBuilder
from torch.utils.cpp_extension import CUDA_HOME
if CUDA_HOME is None:
    sys.exit("no nvcc")
operator = FusedAdamBuilder().load()
print(operator.__file__, *vars(operator))
"""


@pytest.mark.slow
@pytest.mark.skipif("MMR1_DS_NVCC" not in os.environ, reason="takes three minutes: export MMR1_DS_NVCC=1")
def test_fused_adam_is_built_for_h100_and_b200(tmp_path):
    """Compiled, linked and imported; three minutes on two cores, where there is an nvcc."""
    variables = environment(TORCH_CUDA_ARCH_LIST="9.0;10.0", TORCH_EXTENSIONS_DIR=str(tmp_path), DS_ACCELERATOR="cuda")
    use_own_nvcc(variables)
    # Headers of torch's own libraries, for a toolkit that is little more than nvcc.
    spec = find_spec("nvidia")
    folders = [Path(path) for path in spec.submodule_search_locations or ()] if spec is not None else []
    headers = [str(path) for folder in folders for path in folder.glob("cu*/include")]
    if not any(Path(path, "cusparse.h").exists() for path in [*headers, "/usr/local/cuda/include"]):
        pytest.skip("no headers of CUDA's libraries (requirements/gpu.lock brings them)")
    variables |= {"CPLUS_INCLUDE_PATH": ":".join(headers)}
    done = subprocess.run([sys.executable, "-c", BUILD], env=variables, capture_output=True, text=True, timeout=1200)
    if done.returncode and done.stderr.endswith("no nvcc\n"):
        pytest.skip("there is no nvcc here to compile with")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    path, *found = done.stdout.splitlines()[-1].split()
    assert "multi_tensor_adam" in found
    built = Path(path).read_bytes()
    assert b"sm_90" in built and b"sm_100" in built
