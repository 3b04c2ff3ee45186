"""The serving room: OpenAI wire, text, embedded engine, backends and CLI. Never imports torch."""
