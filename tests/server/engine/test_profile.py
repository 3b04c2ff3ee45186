"""The core's profile: seconds by op while it is on, nothing while it is off, and no other result for it."""

import numpy as np

from quant.formats import GGMLType
from tests.server.engine.core_twin import Shape, Twin, run

IDS = np.arange(12, dtype=np.int32)


def test_ops_have_time_while_it_is_on() -> None:
    core = Twin(Shape(), GGMLType.Q8_0).core()
    run(core, [(IDS, 0, range(2), -1)])
    assert set(core.profile(True).values()) == {0.0}
    first = run(core, [(IDS, 0, range(2), -1)])[0]
    seconds = core.profile(False)
    assert {op for op, value in seconds.items() if value > 0} >= {
        "embed", "norm", "qkv", "rope", "attention", "out", "gate_up", "activation", "down", "head",
    }  # fmt: skip
    assert seconds["lora"] == 0.0
    np.testing.assert_array_equal(run(core, [(IDS, 0, range(2), -1)])[0], first)
    assert set(core.profile(False).values()) == {0.0}
