"""The one MetaData that every room's `tables.py` defines its tables on, and the storage room's own table.

Constraint names are fixed here, because migrations must be able to name what they change.
"""

from sqlalchemy import Column, LargeBinary, MetaData, String, Table

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

secrets_table = Table(
    "storage_secrets",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", LargeBinary, nullable=False),
)
"""Random bytes that all servers on one database must agree on (keys of digests), made once by `Database.secret`."""
