"""What leaves a trained generator: files that hold it, and images."""
