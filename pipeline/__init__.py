"""A GAN training pipeline; README.md has the table of its folders."""

import os

# OpenMP's threads spin while they wait for one another, by default so long that beside another busy process they keep
# each other from the core that they wait for. GNU's OpenMP reads this once, when torch loads it; a user's own wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
