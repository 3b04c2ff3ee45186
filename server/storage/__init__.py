"""The database that traces, keys and the adapter registry share: SQLite or PostgreSQL behind one small object."""
