"""Named failures of the training room: each says what happened, and what to do where something can be done."""


class FinetuneError(Exception):
    """Base of everything that is the data's, the operator's or the machine's fault."""


class TrainingError(FinetuneError):
    """A run that cannot go on: settings that fit nothing, a loss that is no number, a checkpoint of something else."""


class DivergedError(TrainingError):
    """The loss or a gradient is no number, or the loss has run away: nothing of this run may be used."""
