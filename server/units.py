"""How sizes are written for people."""


def format_bytes(num_bytes: int) -> str:
    """Binary units with three digits at most: 1.00 GiB, 94.0 MiB, 512 B."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.3g} {unit}"
