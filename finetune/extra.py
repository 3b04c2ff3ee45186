"""What training needs and serving does not: the extra `finetune`, looked for without importing it."""

import importlib.util

from server.errors import ConfigError

PACKAGES = ("torch", "safetensors")


def check_extra() -> None:
    """Raises ConfigError, one line that names the command."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"training needs {' and '.join(missing)}: pip install 'sterna[finetune]'")
