"""What the compiler made of the kernels: objects export their table alone, so that the linker picks no code of one
instruction set for another, and the cache lines that the source asks for are asked for."""

import re
import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[2] / "build"


@pytest.mark.slow  # needs the object files that `make` leaves in build/
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_an_isa_exports_only_its_table(isa: str) -> None:
    objects = list(BUILD.rglob(f"kernels_{isa}.cpp.o"))
    assert objects, f"no object of kernels_{isa}.cpp under {BUILD}: build with `make`"
    for path in objects:
        names = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout.splitlines()
        exported = [line.split(maxsplit=2)[2] for line in names if line[17] in "TWVuDBR"]
        assert exported == [f"sterna::{isa}_table()"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "callers"),
    [
        ("kernels_scalar.cpp", "matmul_group|panel_block"),
        ("kernels_avx2.cpp", "matmul_group|panel_block"),
        ("kernels_avx512.cpp", "matmul_group|panel_block"),
        ("low_rank.cpp", "multiply_with_low_rank"),
        ("attend.cpp", "rotate_and_store"),
    ],
)
def test_what_is_asked_for_ahead_is_in_the_code(source: str, callers: str) -> None:
    """GCC 12 drops calls of functions that only prefetch, not those functions: so their callers are looked at, which
    have the prefetch itself or the call. Without it a step was a fifth slower, and no other test told."""
    objects = list(BUILD.rglob(f"{source}.o"))
    assert objects, f"no object of {source} under {BUILD}: build with `make`"
    for path in objects:
        code = subprocess.run(["objdump", "-drC", path], capture_output=True, text=True, check=True).stdout
        parts = [part.partition("\n")[::2] for part in code.split("\n\n")]
        asking = "\n".join(body for name, body in parts if re.search(callers, name))
        assert re.search(r"\tprefetch|\tprfm|Core::fetch_(now|next|entry)", asking), (
            f"{path}: {callers} asks for nothing"
        )
