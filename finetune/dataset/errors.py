"""Named failures of the datasets."""

from collections.abc import Mapping

from finetune.errors import FinetuneError


class UnrenderableError(FinetuneError):
    """A conversation that the template refuses, or an answer that the server would not read back as it was meant."""


class SnapshotError(FinetuneError):
    """A snapshot that is not there, was erased, or is not what its digest says."""


class NothingToLearnError(FinetuneError):
    """No trace, or too few, came through the filters: an answer, not a fault. `dropped`: how many for which reason."""

    def __init__(self, adapter: str, num_kept: int, num_wanted: int, dropped: Mapping[str, int]) -> None:
        counts = ", ".join(f"{reason} {count}" for reason, count in dropped.items()) or "there are no traces at all"
        super().__init__(
            f"nothing to learn for '{adapter}': {num_kept} usable examples, at least {num_wanted} are wanted; "
            f"dropped: {counts}"
        )
        self.num_kept = num_kept
        self.dropped = dict(dropped)


class DialogueError(FinetuneError):
    """Generated dialogues that cannot be made, or a file of them that is not what it should be."""
