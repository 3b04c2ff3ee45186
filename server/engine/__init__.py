"""The embedded engine: tokens in, tokens out. Knows nothing of text or HTTP."""
