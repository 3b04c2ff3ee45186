"""Scripts that run inside a peer's own virtual environment and print one line of JSON. They import nothing of ours."""
