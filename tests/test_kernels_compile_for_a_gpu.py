"""Do the Triton kernels compile for a Hopper GPU? Triton's interpreter takes what its compiler refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_pipeline import ROOT

pytest.importorskip("triton")


@pytest.mark.slow
def test_every_kernel_compiles_as_it_is_called(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests" / "compiled_kernels.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    code = "".join(path.read_text() for path in (ROOT / "training").glob("kernels*.py"))
    launched = set(re.findall(r"^ +(_\w+)\[[\w(]", code, re.MULTILINE))
    assert len(launched) > 15
    assert launched <= set(done.stdout.split())
