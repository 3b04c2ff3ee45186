"""PostgreSQL as we use it: through psycopg 3, commits on disk before they return, dead connections replaced unseen."""

from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

CONNECT_TIMEOUT_SECONDS = 5


def open_postgres(url: URL, lock_timeout_seconds: float) -> Engine:
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_pre_ping=True,
        hide_parameters=True,  # errors are logged, and parameters are what people said
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "application_name": "sterna",
            "tcp_user_timeout": 10_000,  # milliseconds; a peer that vanished is noticed in seconds, not in 15 minutes
        },
    )

    @event.listens_for(engine, "connect")
    def on_connect(connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()
        cursor.execute("SET synchronous_commit = on")
        cursor.execute("SET timezone = 'UTC'")
        cursor.execute(f"SET lock_timeout = {round(lock_timeout_seconds * 1000)}")
        cursor.close()
        connection.commit()

    return engine
