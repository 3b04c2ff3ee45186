"""Alembic's entry point: runs the revisions on the connection, and in the transaction, that `migrate.py` hands over."""

from alembic import context

from server.storage.metadata import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,  # SQLite has it too, once BEGIN is ours
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
