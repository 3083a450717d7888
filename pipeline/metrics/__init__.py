"""Scores of images: feature spaces, formulae, cached real statistics, and their evaluation over all ranks."""

from pipeline.metrics.evaluation import evaluate_images
from pipeline.metrics.features import FeatureExtractor, load_features

__all__ = ["FeatureExtractor", "evaluate_images", "load_features"]
