"""What all tests share: one thread for each process, and no deadline for a slow machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is imported

from hypothesis import settings

# On top of the current profile, which on continuous integration is hypothesis' reproducible one.
settings.register_profile("mmrl", parent=settings(), deadline=None)
settings.load_profile("mmrl")
