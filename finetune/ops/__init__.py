"""Hand-written forward and backward passes of the training model; the slow twins are in tests/finetune/ops."""
