"""The live node against the simulator, on the same arrivals: `mmrl validate`.

`record` says what is kept of a live run, `measure` makes such runs, `compare` plays them through
the simulator and works out the errors, `report` shows them. Measuring needs neither typer nor
plotly: ``python -m mmrl.deploy.validate`` does it on a machine that has only what serves.
"""
