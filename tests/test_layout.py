"""The shape of the repository: the README's file map, docstrings, who may import whom, and that serving needs no torch.

`python -m tests.test_layout` prints the file map that the README should hold, made from the modules' first lines.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("server", "quant", "finetune")
NOT_IN_MAP = re.compile(r"(^|/)(__init__\.py|py\.typed|\.gitkeep|\.gitignore|\.gitattributes)$")
MAX_LINES = 330
"""About 300 is the house rule; the rest is grace for a table."""

TRAINING = {"torch", "transformers", "peft", "accelerate"}
WEB = {
    "fastapi",
    "starlette",
    "uvicorn",
    "httptools",
    "pydantic",
    "tokenizers",
    "jinja2",
    "llguidance",
    "prometheus_client",
}

MAY_IMPORT = {
    "quant": {"quant", "_sterna"},
    "server.engine": {"server.engine", "server.errors", "quant", "_sterna"},
    "server.text": {"server.text", "server.errors", "quant"},
    "server.tools": {"server.tools", "server.text", "server.errors", "server.engine.params", "quant"},
    "server.openai.protocol": {"server.openai.protocol", "server.errors"},
}


def tracked(*patterns: str) -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    output = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in output.splitlines() if (ROOT / name).exists()]


def modules(*folders: str) -> list[str]:
    return [name for name in tracked(*folders) if name.endswith(".py")]


def imports(name: str) -> Iterator[str]:
    """Absolute names that a module imports, wherever in it the statement stands."""
    for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            yield str(node.module)


def mapped_files() -> list[str]:
    """The first word of each line of the README's code block under "File map"."""
    found = re.search(r"^## File map\n.*?^```\w*\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
    assert found, "README.md has no section '## File map' with a code block"
    return [line.split()[0] for line in found[1].splitlines() if line.strip()]


def files_for_the_map() -> list[str]:
    """What a reader looks for: everything but tests (they mirror the rooms) and package markers."""
    return [name for name in tracked() if not NOT_IN_MAP.search(name) and not name.startswith("tests/")]


def test_the_readme_maps_every_file_once() -> None:
    mapped = mapped_files()
    assert len(mapped) == len(set(mapped)), "a file is listed twice"
    folders = [name for name in mapped if name.endswith("/")]
    expected = {name for name in files_for_the_map() if not name.startswith(tuple(folders))}
    listed = set(mapped) - set(folders)
    assert listed == expected, f"missing: {sorted(expected - listed)}; gone: {sorted(listed - expected)}"
    for folder in folders:
        assert tracked(folder), f"{folder} is listed but has no files"


@pytest.mark.parametrize("name", modules("server", "quant", "finetune", "loadtests", "benchmarks", "tests"))
def test_every_module_says_what_it_does(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    if name.startswith("tests/") and not text.strip():
        return
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, f"{name} has no docstring"
    assert len(docstring.splitlines()) <= 15


@pytest.mark.parametrize("name", modules(*PACKAGES))
def test_modules_stay_short(name: str) -> None:
    assert len((ROOT / name).read_text("utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_down(room: str) -> None:
    for name in modules(room.replace(".", "/")):
        for imported in imports(name):
            if imported.split(".")[0] in (*PACKAGES, "_sterna", "tests"):
                allowed = any(imported == top or imported.startswith(f"{top}.") for top in MAY_IMPORT[room])
                assert allowed, f"{name} imports {imported}"


def test_serving_names_no_training_library() -> None:
    for name in modules("server", "quant"):
        assert not {imported.split(".")[0] for imported in imports(name)} & (TRAINING | {"pickle"}), name


def test_the_environment_is_read_in_the_settings_only() -> None:
    for name in modules("server", "quant"):
        if name != "server/config.py":
            text = (ROOT / name).read_text("utf-8")
            assert not re.search(r"\bos\.environ\b|\bgetenv\b|\benviron\[", text), name


def import_all_blocking(blocked: set[str], packages: list[str]) -> None:
    """Import every module of the packages in a new process in which the blocked names do not exist."""
    script = f"""
import importlib, pkgutil, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
for name in {packages!r}:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        importlib.import_module(module.name)
assert not {blocked!r} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_serving_imports_without_torch() -> None:
    import_all_blocking(TRAINING, ["server"])


def test_the_engine_imports_without_web_and_tokenizer_packages() -> None:
    import_all_blocking(TRAINING | WEB, ["server.engine"])


def first_line(name: str) -> str:
    """The first sentence of a module's docstring, or of the comment that opens another file."""
    text = (ROOT / name).read_text("utf-8", errors="replace")
    if name.endswith(".py"):
        line = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
    else:
        line = next((line for line in text.splitlines() if line.startswith(("//", "# ")) and len(line) > 3), "")
        line = line.lstrip("/# ")
    return re.split(r"(?<=[a-z)`])\.(?: |$)", line)[0]


def main() -> None:
    names = files_for_the_map()
    width = max(len(name) for name in names)
    for name in names:
        print(f"{name:<{width}}  {first_line(name)}".rstrip())


if __name__ == "__main__":
    main()
