"""`launch/gpu_check.sh`: whether the pipeline does on this machine's GPUs what it promises."""
