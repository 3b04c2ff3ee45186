"""The trace log: every answered request, the episodes they form, and the feedback that arrives later."""
