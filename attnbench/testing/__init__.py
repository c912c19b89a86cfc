"""The conformance kit: tests that every backend must pass, for its author to subclass or `attnbench plugins check`."""

from __future__ import annotations

from attnbench.testing.conformance import BackendConformance

__all__ = ["BackendConformance"]
