"""The compiled kernels' sources, as package data."""
