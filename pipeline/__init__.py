"""A GAN training pipeline; README.md has the table of its folders."""

from pipeline.distributed.interrupt import end_quietly_while_importing

end_quietly_while_importing()  # before anything that takes long
