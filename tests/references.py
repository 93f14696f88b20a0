"""References of noise, their networks untrained: what whatever scores needs to run at all."""

import pathlib

import numpy as np
from flax import nnx

from tokgen.evaluation import feature_extractors, local_classifier, references as references_
from tokgen.metrics import moments


def of_noise(path: pathlib.Path, size: tuple[int, int], classes: tuple[str, ...]) -> None:
    """Write one of images of a size and of classes with these names."""
    network = local_classifier.PhotographClassifier(3, len(classes), rngs=nnx.Rngs(0))
    extractor = feature_extractors.local(network, {"classes": list(classes)})
    image_NHW3 = np.random.default_rng(0).integers(0, 255, (40, *size, 3), np.uint8)
    found = feature_extractors.features(extractor, image_NHW3)
    layers = {name: found[name] for name in ("pooled", "spatial")}
    record = {
        **{"protocol": "local", "dataset": "noise", "fingerprint": "0" * 64, "split": "train"},
        **{"count": 40, "size": list(size), "crop": "center", "classes": list(classes)},
        "extractor": extractor.record,
        "layers": {name: rows.shape[1] for name, rows in layers.items()},
    }
    found_moments = {name: moments.Moments.of(rows) for name, rows in layers.items()}
    labels = np.arange(40) % len(classes)
    arrays = feature_extractors.arrays(extractor)
    references_.save(path, record, found_moments, layers, np.arange(40), labels, arrays)
