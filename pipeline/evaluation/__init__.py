"""Scores of images: feature spaces, formulae, kept features of the real splits, and their evaluation by all ranks."""

from pipeline.evaluation.evaluate import evaluate_images
from pipeline.evaluation.extract import ImageSet
from pipeline.evaluation.features import FeatureExtractor, load_features

__all__ = ["FeatureExtractor", "ImageSet", "evaluate_images", "load_features"]
