"""The server as the learner sees it: its HTTP API."""
