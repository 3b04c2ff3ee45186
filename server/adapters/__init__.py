"""Adapter versions: the registry of them, their files, which one answers a request, and which are in memory."""
