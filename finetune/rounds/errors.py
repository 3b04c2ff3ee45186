"""Failures of a round that its callers tell apart."""

from finetune.errors import FinetuneError
from server.errors import SternaError


class RoundError(FinetuneError):
    """The round cannot end well, and the message says why: it is over, and nothing was promoted."""


class CanaryHeldError(RoundError):
    """Another version is the adapter's canary, and nobody has decided about it yet."""


class UnknownAdapterError(RoundError):
    """Neither the registry nor the log knows the name: it is mistyped, most likely."""


class SnapshotChangedError(FinetuneError):
    """A trace of the round's snapshot was deleted: the round begins anew without it."""


class LeaseLostError(SternaError):
    """Somebody else works on this adapter now."""


class LeaseHeldError(SternaError):
    """Somebody else works on this adapter; the message says who."""


class StoppedError(SternaError):
    """We were asked to stop; the round goes on where it was when it is run again."""


class RoundNotFoundError(SternaError):
    """There is no such round."""
