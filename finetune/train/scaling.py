"""The loss scale of float16: gradients are computed so many times too large, so that small ones do not vanish.

A step whose gradients are not finite is skipped and halves the scale; 200 good ones in a row double it (2,000 is usual
where runs are long; ours are hundreds to thousands of steps). The state is in the run's progress, so that a resumed run
goes on the same. Micikevicius et al., arXiv:1710.03740. bfloat16 and float32 need none of this: their scale stays 1.
"""

from dataclasses import replace

from finetune.errors import DivergedError
from finetune.train.checkpoint import Progress

FIRST_SCALE = 2.0**16
LARGEST_SCALE = 2.0**24
GROWTH_STEPS = 200


def begin_scaling(progress: Progress) -> Progress:
    """Of a new run; a resumed one keeps its scale."""
    return replace(progress, loss_scale=FIRST_SCALE) if progress.step == 0 else progress


def scaled_on(progress: Progress, *, is_finite: bool) -> Progress:
    """The scale after a step. Raises DivergedError where even 1 overflows."""
    if not is_finite:
        if progress.loss_scale <= 1:
            raise DivergedError("the gradients overflow float16 even unscaled; train in bfloat16 or float32")
        return replace(progress, loss_scale=progress.loss_scale / 2, num_good=0)
    if progress.num_good + 1 >= GROWTH_STEPS and progress.loss_scale < LARGEST_SCALE:
        return replace(progress, loss_scale=progress.loss_scale * 2, num_good=0)
    return replace(progress, num_good=progress.num_good + 1)
