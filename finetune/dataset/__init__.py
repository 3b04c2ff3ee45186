"""Datasets: from logged traces to a frozen snapshot, to tokenized examples, to packed micro-batches."""
