"""What `pipeline/benchmark.py` measures, and what it is measured against."""
