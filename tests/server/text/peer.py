"""llama.cpp's tokenizer, in a process of its own: llama-cpp-python is not a dependency and has its own environment."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PEER_PYTHON = os.environ.get("STERNA_TEST_LLAMACPP_PYTHON", "/opt/peers/llamacpp/bin/python")


def llamacpp_tokens(
    model: Path, texts: Sequence[str], *, add_special: bool = True, parse_special: bool = True
) -> dict[str, Any]:
    """{"ids": token ids of every text, "eog": end-of-generation ids, "pieces": bytes of every token as hex}."""
    request = {"model": str(model), "texts": list(texts), "add_special": add_special, "parse_special": parse_special}
    command = [PEER_PYTHON, str(Path(__file__).with_name("llamacpp_peer.py"))]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
