"""Runs the scheduler over a FakeCore step by step, without threads, checking the block manager's books each time."""

from array import array
from collections.abc import Sequence as SequenceOf

from server.engine.adapters import LoadedAdapter
from server.engine.block_manager import BlockManager
from server.engine.drafting import Drafter
from server.engine.params import EngineOutput, Grammar, SamplingParams
from server.engine.runner import Runner
from server.engine.scheduler import Outputs, Scheduler
from server.engine.sequence import Sequence
from server.engine.stats import Counters
from server.engine.step import StepPlan
from server.engine.stream import merge_outputs
from tests.server.engine.fake_core import FakeCore, reference_tokens


class Driver:
    def __init__(
        self,
        core: FakeCore | None = None,
        *,
        max_mixed_prefill_tokens: int = 16,
        prefix_caching: bool = True,
        max_draft_tokens: int = 0,
    ):
        self.core = core or FakeCore()
        self.counters = Counters()
        self.blocks = BlockManager(self.core.num_blocks, self.core.block_size, enable_prefix_caching=prefix_caching)
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=self.core.max_num_seqs,
            max_num_batched_tokens=self.core.max_batch_tokens,
            max_logit_rows=self.core.max_logit_rows,
            max_mixed_prefill_tokens=max_mixed_prefill_tokens,
            counters=self.counters,
            drafter=Drafter(max_draft_tokens, self.counters) if max_draft_tokens else None,
        )
        self.runner = Runner(
            self.core,
            max_num_seqs=self.core.max_num_seqs,
            max_tokens=self.core.max_batch_tokens,
            max_blocks=self.core.num_blocks,
        )
        self.max_model_len = self.core.num_blocks * self.core.block_size
        self.sequences: list[Sequence] = []
        self.outputs: dict[Sequence, list[EngineOutput]] = {}

    def add(
        self,
        prompt: SequenceOf[int],
        params: SamplingParams,
        *,
        ends: frozenset[int] = frozenset(),
        adapter: LoadedAdapter | None = None,
        grammar: Grammar | None = None,
        cache_salt: bytes = b"",
    ) -> Sequence:
        seq = Sequence(
            len(self.sequences),
            array("i", prompt),
            params,
            seed=params.seed or 0,
            end_token_ids=ends,
            max_length=min(len(prompt) + params.max_tokens, self.max_model_len),
            adapter=adapter,
            grammar=grammar,
            cache_salt=cache_salt,
        )
        self.sequences.append(seq)
        self.outputs[seq] = []
        self.scheduler.add(seq)
        return seq

    def step(self) -> StepPlan:
        outputs: Outputs = []
        plan = self.scheduler.schedule()
        self.check()
        if plan.sequences:
            self.scheduler.postprocess(plan, self.runner.run(plan), outputs)
        self.take(outputs)
        self.check()
        return plan

    def cancel(self, seq: Sequence) -> None:
        outputs: Outputs = []
        self.scheduler.end(seq, "cancelled", outputs)
        self.take(outputs)
        self.check()

    def take(self, outputs: Outputs) -> None:
        for seq, output in outputs:
            self.outputs[seq].append(output)

    def check(self) -> None:
        self.blocks.check_invariants(self.sequences)
        assert len(self.scheduler.running) <= self.core.max_num_seqs
        assert len({seq.slot for seq in self.scheduler.running}) == len(self.scheduler.running)
        assert all(not seq.blocks and seq.slot < 0 for seq in self.scheduler.waiting)

    def run(self, max_steps: int = 10_000) -> int:
        for num_steps in range(max_steps):
            if not self.scheduler.has_work:
                return num_steps
            self.step()
        raise AssertionError("the scheduler does not finish")

    def result(self, seq: Sequence) -> EngineOutput:
        return merge_outputs(self.outputs[seq])

    def tokens(self, seq: Sequence) -> list[int]:
        return list(self.result(seq).token_ids)

    def expected(self, seq: Sequence, lora: str = "", grammar: Grammar | None = None) -> list[int]:
        return reference_tokens(
            seq.token_ids[: seq.num_prompt].tolist(),
            seq.params,
            lora=lora,
            end_token_ids=seq.end_token_ids,
            max_model_len=self.max_model_len,
            vocab_size=self.core.vocab_size,
            grammar=grammar,
        )
