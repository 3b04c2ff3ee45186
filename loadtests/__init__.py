"""Load clients: locust users and a light raw-SSE client."""
