"""Which kernels "auto" means: the best whose instructions the CPU has, by what Linux says of it."""

from pathlib import Path

import pytest

import _sterna

CPUINFO = Path("/proc/cpuinfo")
NEEDS = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    "avx2": {"avx2", "fma", "f16c"},
    "scalar": set(),
}


def cpu_flags() -> set[str]:
    if not CPUINFO.exists():
        pytest.skip("only Linux lists its CPU's flags in a file")
    lines = CPUINFO.read_text("utf-8").splitlines()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def test_every_isa_that_the_cpu_has_is_offered_best_first() -> None:
    flags = cpu_flags()
    assert _sterna.available_isas() == [isa for isa, needs in NEEDS.items() if needs <= flags]


def test_auto_is_the_first_that_is_offered() -> None:
    sizes = {"num_layers": 1, "hidden": 32, "ffn": 32, "num_heads": 1, "num_kv_heads": 1, "head_dim": 32, "vocab": 8}
    model = _sterna.Model(
        **sizes,
        rope_dim=32,
        max_positions=16,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_factors=[],
        squared_relu=False,
        row_scales=False,
        two_streams=False,
        isa="auto",
        num_threads=1,
    )
    assert model.isa == _sterna.available_isas()[0]
