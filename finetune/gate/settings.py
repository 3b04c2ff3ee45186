"""The gate's thresholds: one frozen object with the defaults, stored in every decision."""

from dataclasses import dataclass

from finetune.gate.spending import BUDGET_PER_ROUTE


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSettings:
    min_clusters: int = 100
    min_stratum_clusters: int = 25
    """With traces that expect a call, and that expect none: at 25 a version 20 points under a floor of 80 % passes it
    in 3 % of gates. Balanced accuracy needs both strata."""
    budget_per_route: float = BUDGET_PER_ROUTE
    max_accuracy_loss: float = 0.05
    """Delta of the second route."""
    min_no_call: float = 0.80
    min_well_formed: float = 0.90
    max_no_call_drop: float = 0.05
    max_well_formed_drop: float = 0.05
    max_perplexity_rise: float = 0.05
    """Relative, on the regression set."""
    max_format_drop: float = 0.05
