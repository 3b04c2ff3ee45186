"""The vocabulary of the OpenAI wire: request models (pydantic, strict) and response objects (TypedDicts).

No HTTP and no engine here, so that backends below and routes above can share it. Requests are checked
once, at the door, and may cost a model build; response chunks are plain dicts, because one is built a token.
"""
