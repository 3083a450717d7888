"""A GAN training pipeline; README.md has the table of its folders."""

from pipeline.distributed.launcher import let_threads_sleep

let_threads_sleep()  # before torch is imported, whatever of the pipeline is
