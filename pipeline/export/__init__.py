"""What leaves a trained generator: files of it, and images."""
