"""The QLoRA training model: a frozen base as the served file has it, and LoRA factors that learn."""
