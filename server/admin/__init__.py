"""The HTTP API beside OpenAI's: what operators, the training sidecar and the command line ask of a running server."""
