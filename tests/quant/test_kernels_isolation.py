"""Code of one instruction set cannot be picked by the linker for another: kernel objects export their table alone."""

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
