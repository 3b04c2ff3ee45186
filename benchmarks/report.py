"""What benchmarks print: tables in Markdown, a section of a document replaced by new ones, the machine and the commit.

Measures nothing itself.
"""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_vbmi",
    "amx_int8",
    "amx_bf16",
)


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the heading; all columns but the first are to the right."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def replace_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the lines `<!-- NAME -->` and `<!-- /NAME -->` of a document. Exits without these."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = path.read_text("utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{path} has no lines {begin.strip()} and {end}: put them where the table belongs")
    path.write_text(before + begin + text.rstrip() + "\n" + end + after, "utf-8")


def cpu() -> dict[str, str]:
    """Model and those flags that kernels care about, as Linux names them."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except FileNotFoundError:
        text = ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    present = fields.get("flags", "").split()
    return {"cpu": fields.get("model name", "unknown"), "flags": " ".join(f for f in _FLAGS if f in present)}


def commit() -> str:
    """With a plus sign when tracked files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def finish(text: str, figures: dict, *, json_only: bool, markdown: Path | None, section: str) -> None:
    """The end of a benchmark: tables (also into a document, if one is named), then one line of JSON."""
    if markdown is not None:
        replace_section(markdown, section, text)
    if not json_only:
        print(text)
    print(json.dumps({**figures, **cpu(), "commit": commit()}))
