"""A gate's decision, made by the gate from answers that are right."""

from finetune.gate.decision import Decision, decide
from finetune.gate.results import Judged, Label, PairedTrace
from finetune.gate.settings import GateSettings
from finetune.gate.spending import History

RIGHT = Judged(True, True, True, True, 0.1)
SILENT_RIGHT = Judged(False, True, True, True, 0.1)
SILENT_WRONG = Judged(False, False, False, False, 2.0)


def a_decision(settings: GateSettings, num_call: int = 80, num_none: int = 40) -> Decision:
    """The candidate is right everywhere, its opponent where no call is expected."""
    pairs = []
    for number in range(num_call + num_none):
        expects_call = number < num_call
        pairs.append(
            PairedTrace(
                trace_id=f"trace-{number}",
                cluster=f"cluster-{number}",
                position=number + 1,
                label=Label.KNOWN_ANSWER,
                expects_call=expects_call,
                is_seen=True,
                candidate=RIGHT if expects_call else SILENT_RIGHT,
                opponent=SILENT_WRONG if expects_call else SILENT_RIGHT,
            )
        )
    return decide(
        pairs,
        adapter="tools",
        candidate="tools@1",
        opponent="base",
        has_live=False,
        history=History(),
        settings=settings,
    )
