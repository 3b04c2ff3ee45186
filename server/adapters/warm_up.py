"""One token from a version that was just loaded, before anybody can have it: does it compute numbers at all?

Every value of an adapter file is finite, and its product with the base can still overflow: then the logits are NaN, or
(where a norm swallows the infinity) all equal, and every answer would be noise. Such a version is refused here, like a
broken file. It buys no speed: what was packed a moment ago is in memory already.

Not in the metrics of requests and not in the trace log, because it goes to the engine directly.
"""

import math
from collections.abc import Sequence

from server.adapters.version import Version
from server.engine.adapters import LoadedAdapter
from server.engine.engine import Engine
from server.engine.params import SamplingParams, TokenLogprob
from server.engine.stream import merge_outputs
from server.errors import AdapterError, ServerUnavailableError

NUM_TOP = 20
"""Log-probabilities that are compared: in a sound model the first token's 20 most likely continuations differ."""
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, num_logprobs=NUM_TOP)


class WarmUp:
    """Residency's `warm_up`. `prompt_ids`: a few tokens of ordinary text."""

    def __init__(self, engine: Engine, prompt_ids: Sequence[int]) -> None:
        self._engine = engine
        self._prompt_ids = prompt_ids
        self._passed: set[str] = set()
        """Digests: what an unloaded version computes does not change until it comes back."""

    async def __call__(self, version: Version, handle: LoadedAdapter) -> None:
        """Raises AdapterError when the version's logits make no sense."""
        if version.digest in self._passed:
            return
        # Before all that waits: a version must not be late because the server is busy.
        stream = self._engine.submit(self._prompt_ids, ONE_TOKEN, adapter=handle, goes_first=True)
        async with stream:
            output = merge_outputs([one async for one in stream])
        if output.error is not None or not output.logprobs:
            raise ServerUnavailableError(f"{version.ref} could not be tried: {output.error or output.finish_reason}")
        reason = _fault(output.logprobs[0])
        if reason is not None:
            raise AdapterError(f"{version.ref} cannot be served: {reason}; its weights are too large for this model")
        self._passed.add(version.digest)


def _fault(first: TokenLogprob) -> str | None:
    values = [first.logprob, *(logprob for _, logprob in first.top)]
    if not all(math.isfinite(value) for value in values):
        return "its logits are not finite"
    if len(values) > 1 and min(values) == max(values):
        return "it gives all tokens the same logit"
    return None
