"""Workloads: who asks which model for how many tokens, and when.

A `Trace` (trace.py) is a list of requests. It is sampled from a `WorkloadSpec` (generators.py,
with token counts from lengths.py) or read from a file that others recorded (readers.py);
describe.py says what is in it.
"""
