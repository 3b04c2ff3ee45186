"""Which models exist: the catalogue, downloading, the cache and inspection."""
