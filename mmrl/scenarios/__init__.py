"""Scenarios: what a scheduler is trained and judged on, by name or from a user's TOML file.

`schema` says what a scenario is (platform, fleet, workload, targets, verbs), `registry` finds one,
`bank` turns its profiles into the numbers of the simulator, and `sampler` draws its episodes with
random streams of `seeds`. `calibrate` finds the rate at which a scenario's load is 1.
"""
