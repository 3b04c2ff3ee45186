"""What is timed on every engine, and the keys under which each engine's script reports it.

Kept free of imports from here: the peers' scripts get it as JSON, in environments of their own.
"""

import json
from dataclasses import asdict, dataclass

BATCHES = (1, 8, 32)
KEYS = ("prefill", "long_prefill", "decode_b1", "decode_b8", "decode_b32", "long_decode")


@dataclass(frozen=True)
class Cases:
    """Prompts are random tokens, distinct; every decode step computes and samples the logits of every row."""

    prefill: int = 512
    long_prefill: int = 4096
    """In pieces of 512 at most, on every engine."""
    steps: int = 64
    """Of decoding, after a prompt of 6 tokens, in a context of 256 a sequence."""
    long_steps: int = 16
    """Of one sequence, after `long_prefill` tokens."""
    repeats: int = 3
    """Medians of so many, within a round."""
    own_clock: bool = False
    """CPU time instead of wall time: for one thread, on a machine that does other things too."""
    num_loras: int = 0
    """Versions of rank 16 to mix in a batch of 32; 0: not timed."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def headings(self) -> tuple[str, ...]:
        at = f"{self.long_prefill:,}"
        batches = tuple(f"decode b{batch}" for batch in BATCHES)
        return (f"prefill {self.prefill:,}", f"prefill {at}", *batches, f"decode b1 at {at}")
