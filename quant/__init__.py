"""Number formats: GGUF and safetensors reading, block types, packing and the compute kernels.

Knows nothing of HTTP, scheduling or adapters. Needs NumPy only.
"""
