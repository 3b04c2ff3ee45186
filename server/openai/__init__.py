"""The OpenAI wire: request models, routes, streaming and error bodies."""
