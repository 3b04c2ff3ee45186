"""The engine knows token ids, not text, HTTP or torch: it imports and runs with those packages blocked."""

import subprocess
import sys
from pathlib import Path

from tests.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parents[3]

SCRIPT = """
import asyncio, sys

class Block:
    NAMES = {"fastapi", "starlette", "uvicorn", "pydantic", "tokenizers", "jinja2", "llguidance", "torch",
             "transformers", "peft", "safetensors", "gguf", "huggingface_hub"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.NAMES:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
from server.engine.engine import Engine
from server.engine.lora import load_adapter_files
from server.engine.params import SamplingParams
from tests.server.engine.fake_core import FakeCore

async def main():
    engine = Engine(FakeCore(), max_model_len=100, max_waiting=4, eog_token_ids=frozenset())
    engine.start(asyncio.get_running_loop())
    outputs = [o async for o in engine.submit([1, 2, 3], SamplingParams(max_tokens=3, temperature=0.0))]
    engine.stop()
    print(sum(len(o.token_ids) for o in outputs))

asyncio.run(main())
"""


def test_runs_without_web_tokenizer_and_training_packages():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"
