"""The watch: is the new version doing harm, and has a canary shown that it does none? Tested after every episode.

`betting` is the mathematics, `ranks` makes latencies comparable, `processes` keeps all tests of a version, `watch`
holds one version's watch with its state and verdict. A pure library: observations in, verdicts out; who collects the
episodes and who changes the routes is elsewhere.
"""
