"""The kernels that TileLang compiles: Python, as package data is."""
