"""Tiny products are fastest on one thread, most of all beside other test runs."""

import pytest

torch = pytest.importorskip("torch", reason="test extra")
torch.set_num_threads(1)
