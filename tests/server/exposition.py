"""Reads what a server exposes to Prometheus."""

from prometheus_client.parser import text_string_to_metric_families

from server.metrics import Metrics

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""By name and labels."""


def parse(text: str) -> Samples:
    return {
        (s.name, frozenset(s.labels.items())): s.value for f in text_string_to_metric_families(text) for s in f.samples
    }


def samples(metrics: Metrics) -> Samples:
    return parse(metrics.render()[0].decode())


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, frozenset(labels.items())]


def label_values(found: Samples, label: str) -> set[str]:
    return {dict(labels)[label] for _, labels in found if label in dict(labels)}
