"""GAN-train: what a classifier learns from generated images alone, measured on real ones."""

from __future__ import annotations

import torch

from pipeline.data import Dataset
from pipeline.data.shards import decode, read_shard
from pipeline.evaluation.extract import ImageSet
from pipeline.evaluation.metrics.states import Poll
from pipeline.evaluation.train_classifier import accuracy, train

MOST_IMAGES, EPOCHS = 10_000, 5
BATCH_SIZE = 500
"""Images rendered at once."""


def gan_train(images: ImageSet, dataset: Dataset, seed: int, device: torch.device, poll: Poll) -> dict[str, object]:
    """Trains the small classifier (features/classifier.py) on the first MOST_IMAGES images and the classes that they
    were asked to show, and tests it on the real test split, or where there is none on the training split, which this
    classifier has not seen either (Shmelkov et al. 2018, arXiv 1807.09499, section 3).

    Close to a classifier trained on as many real images: the generated ones are as good and as varied. GAN-test, the
    reverse, is "class_accuracy" of metrics/classes.py.

    Returns "accuracy" in [0, 1], how many generated "images" it learned from, and how many "real_images" it was tested
    on. Raises DataError naming a shard that is damaged.
    """
    assert images.labels is not None
    count = min(images.num_images, MOST_IMAGES)
    parts = [images.render(start, min(start + BATCH_SIZE, count)) for start in range(0, count, BATCH_SIZE)]
    learned = torch.cat(parts), images.labels[:count]
    network = train(learned, dataset.num_classes, seed=seed, epochs=EPOCHS, device=device, poll=poll)
    split = "test" if "test" in dataset.splits else "train"
    right = 0.0
    for shard in dataset.shards(split):
        poll()
        samples = read_shard(dataset, shard)
        real = torch.from_numpy(decode(samples.images, dataset.image_shape, dataset.locate(shard)))
        assert samples.labels is not None
        right += accuracy(network, (real, torch.from_numpy(samples.labels)), device) * len(real)
    total = dataset.num_images(split)
    return {"accuracy": round(right) / total, "images": count, "real_images": total}
