"""Scores as `torchmetrics.Metric`s over features: see base.py for what they have in common."""

from pipeline.evaluation.metrics.authenticity import Authenticity
from pipeline.evaluation.metrics.classes import ClassScores
from pipeline.evaluation.metrics.frechet import ExtrapolatedFrechetDistance, FrechetDistance
from pipeline.evaluation.metrics.inception_score import InceptionScore
from pipeline.evaluation.metrics.kernel import KernelDistance
from pipeline.evaluation.metrics.manifold import ManifoldScores
from pipeline.evaluation.metrics.sliced import SlicedWasserstein

__all__ = [
    "Authenticity",
    "ClassScores",
    "ExtrapolatedFrechetDistance",
    "FrechetDistance",
    "InceptionScore",
    "KernelDistance",
    "ManifoldScores",
    "SlicedWasserstein",
]
