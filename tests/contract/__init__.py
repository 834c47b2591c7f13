"""The contract that every supported architecture keeps.

Parts, positions, states and interventions, each against a reference. ``python -m tests.contract``
runs all of it and prints a table, architectures x checks.
"""
