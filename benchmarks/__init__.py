"""Measurements: each says what it measures and ends with one line of JSON."""
