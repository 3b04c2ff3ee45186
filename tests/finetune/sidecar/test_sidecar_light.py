"""A sidecar that waits for a round has not loaded torch: 200 MB and two seconds that it does not need yet."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
MODULES = "finetune.sidecar.loop, finetune.sidecar.terminal, finetune.rounds.work, finetune.rounds.report"


def test_the_sidecar_imports_without_torch() -> None:
    script = f"import sys, {MODULES}\nassert not {{'torch', 'transformers'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
