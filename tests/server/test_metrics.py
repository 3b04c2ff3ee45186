"""Metrics: what a request and an engine snapshot leave in the exposition, and that two servers share nothing."""

import dataclasses

import pytest

from server.engine.stats import Counters, EngineStats
from server.metrics import Metrics
from tests.server.exposition import samples, value

STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    num_blocks_used=30,
    num_blocks_cached=10,
    num_blocks_total=120,
    num_adapters=1,
    prefix_query_tokens=1000,
    prefix_hit_tokens=640,
    prompt_tokens=1000,
    generated_tokens=50,
    num_drafts=6,
    draft_tokens=20,
    accepted_tokens=9,
    forced_tokens=11,
    num_preemptions=4,
    num_steps=3,
    num_step_errors=0,
    step_seconds=0.5,
    num_finished=7,
    batch_size_counts=(1, 0, 2, 0, 0, 0, 0, 0, 0, 0),
)


def test_a_request_is_counted_once_with_its_tokens() -> None:
    metrics = Metrics()
    request = metrics.start_request("chat", "base")
    for num_tokens in (1, 1, 2):
        request.on_output(num_tokens)
    request.finish("stop", num_prompt_tokens=12)
    request.finish("cancelled", num_prompt_tokens=12)

    labels = {"endpoint": "chat", "model": "base"}
    assert value(metrics, "sterna_request_success_total", finished_reason="stop", **labels) == 1
    assert not any("cancelled" in dict(labels).values() for _, labels in samples(metrics))
    assert value(metrics, "sterna_prompt_tokens_total", model="base") == 12
    assert value(metrics, "sterna_generation_tokens_total", model="base") == 4
    assert value(metrics, "sterna_time_to_first_token_seconds_count", model="base") == 1
    assert value(metrics, "sterna_inter_token_latency_seconds_count", model="base") == 2
    assert value(metrics, "sterna_e2e_request_latency_seconds_count", model="base") == 1
    assert value(metrics, "sterna_request_generation_tokens_sum", model="base") == 4


def test_choices_of_one_request_have_one_first_token_and_their_own_gaps() -> None:
    metrics = Metrics()
    request = metrics.start_request("completions", "base")
    for choice in (0, 1, 0, 1):
        request.on_output(1, choice)
    request.finish("length", num_prompt_tokens=1)
    assert value(metrics, "sterna_time_to_first_token_seconds_count", model="base") == 1
    assert value(metrics, "sterna_inter_token_latency_seconds_count", model="base") == 2


def test_a_request_without_output_has_no_first_token() -> None:
    metrics = Metrics()
    metrics.start_request("chat", "base").finish("error", num_prompt_tokens=3)
    assert value(metrics, "sterna_time_to_first_token_seconds_count", model="base") == 0
    assert value(metrics, "sterna_request_generation_tokens_bucket", model="base", le="1.0") == 1


def test_the_engine_is_read_at_each_scrape() -> None:
    metrics = Metrics()
    now = STATS
    metrics.watch_engine(lambda: now)
    assert value(metrics, "sterna_num_requests_running") == 3
    assert value(metrics, "sterna_num_requests_waiting") == 2
    assert value(metrics, "sterna_kv_cache_usage_perc") == 0.25
    assert value(metrics, "sterna_prefix_cache_hits_total") == 640
    assert value(metrics, "sterna_spec_decode_num_draft_tokens_total") == 20
    assert value(metrics, "sterna_spec_decode_num_accepted_tokens_total") == 9
    assert value(metrics, "sterna_grammar_forced_tokens_total") == 11
    assert value(metrics, "sterna_prefix_cache_queries_total") == 1000
    assert value(metrics, "sterna_num_preemptions_total") == 4
    now = dataclasses.replace(STATS, num_running=0)
    assert value(metrics, "sterna_num_requests_running") == 0


def test_step_sizes_become_a_cumulative_histogram() -> None:
    counters = Counters()
    for num_seqs in (1, 2, 3, 4, 300):
        counters.count_step(num_seqs, 0.1)
    metrics = Metrics()
    metrics.watch_engine(lambda: dataclasses.replace(STATS, batch_size_counts=tuple(counters.batch_size_counts)))
    buckets = {
        le: value(metrics, "sterna_iteration_num_seqs_bucket", le=le) for le in ("1.0", "2.0", "4.0", "256.0", "+Inf")
    }
    assert buckets == {"1.0": 1, "2.0": 2, "4.0": 4, "256.0": 4, "+Inf": 5}


def test_responses_are_counted_by_endpoint_and_status() -> None:
    metrics = Metrics()
    metrics.count_response("chat", 200)
    metrics.count_response("chat", 429)
    metrics.count_response("chat", 429)
    assert value(metrics, "sterna_http_responses_total", endpoint="chat", status="429") == 2


def test_two_servers_in_one_process_share_nothing() -> None:
    first, second = Metrics(), Metrics()
    first.start_request("chat", "a").finish("stop", num_prompt_tokens=1)
    first.watch_engine(lambda: STATS)
    assert not any("sterna_num_requests" in name for name, _ in samples(second))
    assert not any(dict(labels).get("model") == "a" for _, labels in samples(second))
    assert value(second, "process_resident_memory_bytes") > 0


@pytest.mark.parametrize("name", ["request_success", "prompt_tokens", "generation_tokens"])
def test_names_follow_vllm(name: str) -> None:
    metrics = Metrics()
    metrics.start_request("chat", "m").finish("stop", num_prompt_tokens=1)
    assert any(sample == f"sterna_{name}_total" for sample, _ in samples(metrics))
