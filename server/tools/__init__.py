"""Tool calls and structured output as text: rendering, parsing, reasoning and decoding constraints."""
