"""What a platform can do and what a model costs on it: measured or derived, with provenance.

``schema`` says what a profile file holds, ``curves`` and ``costs`` turn its points into seconds
for every batch, context and prompt, ``derive`` makes profiles for hardware and models that
nobody has measured, and ``registry`` finds them by name or path.
"""
