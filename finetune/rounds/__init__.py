"""Training rounds: from logged traces to a version that the gate has judged, whatever dies on the way."""
