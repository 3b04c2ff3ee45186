"""API keys: who may do what, and whether what they ask is logged."""
