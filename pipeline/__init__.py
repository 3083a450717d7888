"""A GAN training pipeline; README.md has the table of its folders."""
