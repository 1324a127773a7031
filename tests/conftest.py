"""Set before anything imports torch or triton: tiny models are faster on one thread (and two pytest workers do not fight over two cores), and
without a GPU Triton's kernels run in its interpreter, which must be chosen before triton is first imported."""

import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if shutil.which("nvidia-smi") is None and not Path("/dev/nvidiactl").exists():  # a container may have the device and not the tool
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama with a text of numbers beside it."""
    from tiny import save_tiny  # torch only now

    folder = tmp_path_factory.mktemp("model")
    save_tiny("llama", folder)
    (folder / "text.txt").write_text(" ".join(map(str, range(4000))))
    return folder
