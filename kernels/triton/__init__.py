"""The kernels that Triton compiles: Python, as package data is."""
