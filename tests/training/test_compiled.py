"""What one run compiled, the next one finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json, torch
from smartlab.training.setup import compile_report, compiled
net = compiled(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()))
net(torch.rand(4, 8)).sum().backward()
print(json.dumps(compile_report()))
"""


@pytest.mark.slow
def test_compiled_code_is_kept_between_runs_and_reported(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR")}
    env["SMARTLAB_CACHE"] = str(tmp_path)
    first, second = (
        json.loads(
            subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, check=True).stdout
        )
        for _ in range(2)
    )
    assert first["cache"] == second["cache"] == str(tmp_path / "compiled")
    assert first["compiled"] > 0 and first["found"] == 0
    assert second["compiled"] == 0 and second["found"] > 0
