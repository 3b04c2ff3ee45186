"""The learning rate of a step: warm-up, then a cosine to the floor, or a plateau and a straight line to the floor.

Pure functions of the step's number, so that a resumed run needs no state for them. Cosine: Loshchilov and Hutter,
arXiv:1608.03983. Warm-up-stable-decay: Hu et al., MiniCPM, arXiv:2404.06395.
"""

import math

from finetune.train.settings import TrainSettings


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Of step 0, 1, ..., num_steps - 1. The first step of a warm-up is above 0, the last step is at the floor."""
    total = settings.num_steps
    num_warmup = round(settings.warmup_share * total)
    if step < num_warmup:
        return settings.learning_rate * (step + 1) / num_warmup
    floor = settings.floor_share * settings.learning_rate
    above = settings.learning_rate - floor
    if settings.schedule == "cosine":
        progress = (step - num_warmup) / max(total - 1 - num_warmup, 1)
        return floor + above * (1 + math.cos(math.pi * progress)) / 2
    num_decay = round(settings.decay_share * total)
    first_decay = total - num_decay
    if step < first_decay:
        return settings.learning_rate
    return floor + above * (total - 1 - step) / num_decay
