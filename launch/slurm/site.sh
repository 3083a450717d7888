# What differs between clusters. Edit it here, or set the same variable in the environment; every script beside this
# file reads it. sbatch itself reads only its environment, so source this file before a plain `sbatch`.

# export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=project
# module load python

# The folder that holds python and accelerate (inside the container, if there is one).
export PYTHON_BIN=${PYTHON_BIN:-.venv/bin}
# A command that runs the rest of its line in a container, e.g. "apptainer exec --nv gan.sif" (launch/container.def).
export CONTAINER=${CONTAINER:-}
# The interface that the nodes reach each other by, e.g. ib0; empty: the one that the host name resolves to.
export NETWORK_INTERFACE=${NETWORK_INTERFACE:-}
# Ranks of a node in a job without GPUs; with GPUs it is one each.
export RANKS_PER_NODE=${RANKS_PER_NODE:-1}
# 1: a training job begins with pipeline/doctor.py and ends there if that finds an error. 0: it does not.
export DOCTOR=${DOCTOR:-1}
