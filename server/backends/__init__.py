"""What answers an OpenAI request: one Backend protocol, one module for each implementation."""
