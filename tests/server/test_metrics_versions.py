"""Metrics by version: what each event counts, evaluation traffic kept apart, and labels that stay bounded."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.adapters.router import Arm
from server.metrics import Metrics
from tests.server import exposition
from tests.server.exposition import label_values, samples


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return exposition.value(metrics, f"sterna_{name}", **labels)


def models(metrics: Metrics) -> set[str]:
    return label_values(samples(metrics), "model")


def use(metrics: Metrics, model: str) -> None:
    """Everything that leaves series of `model`."""
    request = metrics.start_request("chat", model)
    request.on_output(1)
    request.finish("tool_calls", num_prompt_tokens=3)
    metrics.start_request("chat", model, purpose="evaluation").finish("stop", num_prompt_tokens=3)
    metrics.count_route(model, Arm.LIVE)
    metrics.count_answer(model, True, 2, 1)
    metrics.count_tool_outcome(model, is_error=True)
    metrics.count_feedback(model, "thumbs", 1.0)


def test_call_rate_and_form() -> None:
    metrics = Metrics()
    metrics.count_answer("tools@7", False, 0, 0)
    metrics.count_answer("tools@7", True, 0, 0)
    metrics.count_answer("tools@7", True, 3, 1)
    assert value(metrics, "answers_with_tools_offered_total", model="tools@7") == 2
    assert value(metrics, "answers_with_tool_calls_total", model="tools@7") == 1
    assert value(metrics, "tool_calls_total", model="tools@7", form="well_formed") == 2
    assert value(metrics, "tool_calls_total", model="tools@7", form="malformed") == 1


def test_tool_results_feedback_and_arms() -> None:
    metrics = Metrics()
    metrics.count_tool_outcome("tools@7", is_error=False)
    metrics.count_tool_outcome("tools@7", is_error=True)
    metrics.count_feedback("tools@7", "thumbs", 0.25)
    metrics.count_feedback("tools@7", "thumbs", 1.0)
    metrics.count_feedback("tools@7", "thumbs", None)
    metrics.count_feedback("tools@7", "known_answer", 0.0)
    metrics.count_route("tools@7", Arm.CANARY)
    metrics.count_route("base", Arm.BASE)
    assert value(metrics, "tool_results_total", model="tools@7", outcome="ok") == 1
    assert value(metrics, "tool_results_total", model="tools@7", outcome="error") == 1
    assert value(metrics, "feedback_total", model="tools@7", source="thumbs") == 3
    assert value(metrics, "feedback_score_count", model="tools@7", source="thumbs") == 2
    assert value(metrics, "feedback_score_sum", model="tools@7", source="thumbs") == 1.25
    assert value(metrics, "feedback_score_count", model="tools@7", source="known_answer") == 1
    assert value(metrics, "routed_requests_total", model="tools@7", arm="canary") == 1
    assert value(metrics, "routed_requests_total", model="base", arm="base") == 1


def test_a_rare_event_can_be_rated_from_its_first_time() -> None:
    metrics = Metrics()
    metrics.start_request("chat", "tools@7")
    assert value(metrics, "tool_calls_total", model="tools@7", form="malformed") == 0
    assert value(metrics, "tool_results_total", model="tools@7", outcome="error") == 0
    assert value(metrics, "adapter_swap_seconds_count", outcome="failed") == 0
    assert value(metrics, "traces_not_logged_total", reason="key") == 0
    assert value(metrics, "shadow_runs_total", outcome="dropped") == 0


def test_evaluation_is_counted_alone() -> None:
    metrics = Metrics()
    before = samples(metrics)
    request = metrics.start_request("chat", "tools@7", purpose="evaluation")
    request.on_output(5)
    request.finish("stop", num_prompt_tokens=12)
    request.finish("error", num_prompt_tokens=12)
    metrics.count_route("tools@7", Arm.PINNED, purpose="evaluation")
    metrics.count_answer("tools@7", True, 2, 1, purpose="evaluation")
    changed = {key: new for key, new in samples(metrics).items() if new and new != before.get(key)}
    counted = {(name, labels) for name, labels in changed if name.startswith("sterna_") and "_created" not in name}
    labels = frozenset({"model": "tools@7", "endpoint": "chat", "finished_reason": "stop"}.items())
    assert counted == {("sterna_evaluation_requests_total", labels)}
    assert changed["sterna_evaluation_requests_total", labels] == 1


def test_thousands_of_versions_leave_a_bounded_exposition() -> None:
    metrics = Metrics()
    use(metrics, "full")
    for number in range(2000):
        use(metrics, f"tools@{number}")
        if number == 100:
            num_series = len(samples(metrics))
    assert models(metrics) == {f"tools@{number}" for number in range(2000 - 64, 2000)}
    assert len(samples(metrics)) == num_series


def test_the_version_used_longest_ago_goes_from_every_family() -> None:
    metrics = Metrics(max_versions=2)
    use(metrics, "tools@1")
    use(metrics, "tools@2")
    metrics.count_tool_outcome("tools@1", is_error=False)
    use(metrics, "tools@3")
    assert models(metrics) == {"tools@1", "tools@3"}
    use(metrics, "tools@2")  # back, from 0
    assert models(metrics) == {"tools@2", "tools@3"}
    assert value(metrics, "tool_results_total", model="tools@2", outcome="error") == 1


def test_a_request_outlives_the_series_of_its_version() -> None:
    metrics = Metrics(max_versions=1)
    request = metrics.start_request("chat", "tools@1")
    use(metrics, "tools@2")
    request.on_output(1)
    assert models(metrics) == {"tools@2"}
    request.finish("stop", num_prompt_tokens=3)
    assert models(metrics) == {"tools@1"}
    assert value(metrics, "request_generation_tokens_sum", model="tools@1") == 1


def test_outcomes_come_from_any_thread() -> None:
    metrics = Metrics(max_versions=4)
    barrier = threading.Barrier(4)

    def count(thread: int) -> None:
        barrier.wait()
        for number in range(300):
            metrics.count_tool_outcome("tools@0", is_error=False)
            metrics.count_tool_outcome(f"tools@{thread}-{number}", is_error=True)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(count, thread) for thread in range(4)]:
            done.result()
    assert len(models(metrics)) == 4
    assert value(metrics, "tool_results_total", model="tools@0", outcome="ok") > 0


@pytest.mark.parametrize("reason", ["request", "key", "settings"])
def test_what_is_not_logged_is_counted_by_reason(reason: str) -> None:
    metrics = Metrics()
    metrics.count_unlogged(reason)  # type: ignore[arg-type]
    assert value(metrics, "traces_not_logged_total", reason=reason) == 1


def test_swaps_and_shadow_runs() -> None:
    metrics = Metrics()
    metrics.count_swap("switched", 0.2)
    metrics.count_swap("failed", 3.0)
    metrics.count_shadow("done")
    assert value(metrics, "adapter_swap_seconds_count", outcome="switched") == 1
    assert value(metrics, "adapter_swap_seconds_bucket", outcome="switched", le="0.25") == 1
    assert value(metrics, "adapter_swap_seconds_sum", outcome="failed") == 3.0
    assert value(metrics, "shadow_runs_total", outcome="done") == 1
