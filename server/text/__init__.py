"""Text and tokens: tokenizer, incremental detokenizer and chat template."""
