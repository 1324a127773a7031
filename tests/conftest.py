"""Set before anything imports torch or triton: tiny models are faster on one thread (and two pytest workers do not fight over two cores), and
without a GPU Triton's kernels run in its interpreter, which must be chosen before triton is first imported."""

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
