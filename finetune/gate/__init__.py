"""The gate: is a candidate version better than what answers now, shown on held-out traces?

`expected` and `match` say when an answer is exactly right, `results` judges one answer, `metrics` sums them up,
`statistics` and `bootstrap` test, `spending` keeps the error over an adapter's history, `decision` puts them together,
`report` writes it out. Plain data in, plain data out; nothing here talks to a server or a database.
"""
