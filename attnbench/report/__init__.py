"""Owns everything that turns rows into something to read. pandas and tabulate are imported here alone."""
