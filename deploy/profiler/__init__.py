"""`mmrl profile run`: what models cost on this machine, measured with the live node's own parts.

`run.profile_models` measures one model after the other; ``subject`` holds the model that is being
measured, ``computing``, ``moving`` and ``machine`` are what is measured of it, ``raw`` keeps every
single measurement, and ``fit`` makes profiles of those.
"""
