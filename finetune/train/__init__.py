"""Optimizers, schedules, checkpoints and the one training loop, for adapters and for whole models alike."""
