"""Prompt-lookup drafts: tokens that a step computes before they are sampled, and how many of them pay.

Two sources. A grammar that leaves one token only: it is certain, and its row needs no logits. And the text so far: what
followed the last time that the last tokens occurred, in the prompt or in the output, is likely to follow again. Every
guess is then sampled at its own row, with the random number, penalties and mask of its position, and the first one that
differs ends the step for its sequence: a draft changes how fast tokens come, never which.

How likely a guess holds is counted, by how many tokens matched and for each sequence on its own; a guess that does not
pay its row (step_cost.py) is not computed but still compared, so that a sequence which begins to copy is noticed. Not
here: blocks, budgets and what becomes of a draft (scheduler.py).
"""

from dataclasses import dataclass, field, replace

from _sterna import find_match
from server.engine.params import Grammar
from server.engine.sequence import NO_DRAFT, Draft, Guess, Sequence
from server.engine.stats import Counters
from server.engine.step_cost import StepBudget, StepCost

MAX_MATCH = 4
"""Tokens; longer matches are not told apart."""
FORGET = 0.98
"""Of the counts of all sequences: the last 50 guesses of a kind decide."""
FIRST_RATES = {True: (0.45, 0.5, 0.65, 0.9), False: (0.13, 0.4, 0.55, 0.7)}
"""Share of guesses that held under a grammar and without one, after matches of 1, 2, 3 and 4 or more tokens, until some
were counted: what the default model did on benchmarks/speculation_requests.py."""
PRIOR_GUESSES = 4.0
"""How many of its own guesses a sequence needs to outweigh what is known of all."""
LIKELIEST = 0.97
"""Where not even such a guess pays, as in large batches, none is looked for."""
PAUSE = 8
"""Steps until a sequence is looked at again for which not even a long match would have paid."""


@dataclass(slots=True)
class Rate:
    """How often something held, recent times weighing more."""

    tested: float
    held: float

    def add(self, holds: bool) -> None:
        self.tested = self.tested * FORGET + 1
        self.held = self.held * FORGET + holds


@dataclass(slots=True)
class Drafter:
    """`max_draft_tokens`: guesses a sequence and step, at most; forced tokens come on top."""

    max_draft_tokens: int
    counters: Counters
    cost: StepCost = field(default_factory=StepCost)
    _rates: dict[bool, list[Rate]] = field(
        default_factory=lambda: {kind: [Rate(8.0, 8.0 * rate) for rate in rates] for kind, rates in FIRST_RATES.items()}
    )
    pays: bool = True
    """Whether guesses can pay in this step at all; where they cannot, only a grammar has tokens to give."""
    _budget: StepBudget = field(default_factory=lambda: StepBudget(StepCost(), 1, 1.0))

    def begin_step(self, num_decodes: int) -> None:
        rows = max(num_decodes, 1)
        self._budget = StepBudget(self.cost, rows, float(rows))
        self.pays = self._budget.would_take(LIKELIEST)

    def draft(self, seq: Sequence, max_tokens: int, max_rows: int) -> Draft:
        """At most `max_tokens` tokens, of which at most `max_rows` are sampled."""
        copies = self.pays and seq.draft_pause == 0
        if seq.draft_pause > 0:
            seq.draft_pause -= 1
        if max_tokens <= 0 or not (copies or seq.grammar) or not seq.params.speculation:
            return NO_DRAFT
        tokens = seq.token_ids
        start = len(tokens)
        guesses, probabilities = self._look_ahead(seq, start + max_tokens, max_rows, copies=copies)
        ahead = tokens[start:].tolist()
        del tokens[start:]
        if not ahead:
            return NO_DRAFT
        count = self._budget.pick(probabilities)
        taken = [guess for guess in guesses if guess.index < count]
        unpaid = None
        if len(taken) < len(guesses) and guesses[len(taken)].index == count:
            unpaid = replace(guesses[len(taken)], token=ahead[count])
            if count == 0 and not self._budget.would_take(self._probability(seq, MAX_MATCH)):
                seq.draft_pause = PAUSE
        return Draft(ahead[:count], [*(guess.index for guess in taken), count], taken, unpaid)

    def _look_ahead(self, seq: Sequence, limit: int, max_rows: int, *, copies: bool) -> tuple[list[Guess], list[float]]:
        """Grows the sequence's tokens by all that may follow; the probability of each, and which are guesses."""
        tokens, start = seq.token_ids, len(seq.token_ids)
        grammar: Grammar | None = None if seq.grammar is None else seq.grammar.fork()
        guesses: list[Guess] = []
        probabilities: list[float] = []
        chain, copied, length = 1.0, 0, 0
        room = min(self.max_draft_tokens, max_rows) if copies else 0
        while len(tokens) < limit:
            if grammar is not None and (forced := _forced_tokens(seq, grammar)):
                most = limit - len(tokens)
                if seq.samples_forced:
                    most = min(most, max_rows - len(guesses))
                    guesses += [Guess(len(tokens) - start + i, 0) for i in range(min(most, len(forced)))]
                tokens.extend(forced[:most])
                probabilities += [chain] * min(most, len(forced))
                if len(forced) > most or grammar.take(forced) < len(forced):
                    break
                copied = 0
                continue
            if len(guesses) >= room:
                break
            if not copied:
                copied, length = find_match(tokens, 1, MAX_MATCH)
                if copied < 0:
                    break
            token, guess = tokens[copied], Guess(len(tokens) - start, min(length, MAX_MATCH))
            if token in seq.end_token_ids or (grammar is not None and grammar.take([token]) == 0):
                break
            chain *= self._probability(seq, guess.length)
            guesses.append(guess)
            probabilities.append(chain)
            tokens.append(token)
            copied, length = copied + 1, length + 1
        return guesses, probabilities

    def _probability(self, seq: Sequence, length: int) -> float:
        rate = self._rates[seq.grammar is not None][length - 1]
        return (PRIOR_GUESSES * rate.held / rate.tested + seq.num_held) / (PRIOR_GUESSES + seq.num_tested)

    def learn(self, seq: Sequence, draft: Draft, sampled: list[int]) -> None:
        """`sampled`: the tokens that came of it, the first that differs being the last."""
        num_held = len(sampled) - 1
        tested = [(guess, guess.index < num_held) for guess in draft.guesses if guess.index <= num_held]
        if draft.unpaid is not None and draft.unpaid.index == num_held:
            tested.append((draft.unpaid, sampled[num_held] == draft.unpaid.token))
        for guess, holds in tested:
            if guess.length == 0:  # a forced token that had to be sampled
                continue
            self._rates[seq.grammar is not None][guess.length - 1].add(holds)
            seq.num_tested = seq.num_tested * 0.9 + 1
            seq.num_held = seq.num_held * 0.9 + holds
        guessed = sum(guess.length > 0 for guess in draft.guesses)
        held = sum(guess.length > 0 and guess.index < num_held for guess in draft.guesses)
        self.counters.num_drafts += guessed > 0
        self.counters.draft_tokens += guessed
        self.counters.accepted_tokens += held
        self.counters.forced_tokens += num_held - held


def _forced_tokens(seq: Sequence, ahead: Grammar) -> list[int]:
    """Up to an end of the answer: nothing is computed after one."""
    forced = ahead.forced_tokens()
    for index, token in enumerate(forced):
        if token in seq.end_token_ids:
            return forced[:index]
    return forced
