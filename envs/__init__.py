"""The environment: one simulated node behind the interfaces of Gymnasium and Stable-Baselines3.

`env` is the Gymnasium environment; `vector` and `sb3` are many of them advanced by one compiled
call; `batch` is what the three share, and `layout` names what a policy sees and does.
`timeline` records episodes for pictures (`render`) and Perfetto traces (`perfetto`).
"""
