"""Draws bags with labels and the probabilities that two models give them."""

import numpy as np
from hypothesis import strategies as st


@st.composite
def comparisons(draw, *, min_of_class=2):
    """Labels of two to four classes, and two models' probabilities, with many ties."""
    n_classes = draw(st.integers(2, 4))
    sizes = [draw(st.integers(min_of_class, 8)) for _ in range(n_classes)]
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    labels = generator.permutation(np.repeat(np.arange(n_classes), sizes))
    # Eighths, whose squares are exact.
    one, other = generator.integers(0, 9, size=(2, len(labels), n_classes)) / 8
    return labels, one, other


def equal_models(generator, *, n_of_class, n_classes, of_patient=1, patient_effect=0.0):
    """Two models of the same AUROC whose errors are partly shared, and the patient of each bag."""
    n_bags = n_of_class * n_classes
    labels = np.repeat(np.arange(n_classes), n_of_class)
    patients = np.arange(n_bags) // of_patient
    shared = np.eye(n_classes)[labels] + generator.normal(size=(n_bags, n_classes))
    models = []
    for _ in range(2):
        effects = generator.normal(size=(patients.max() + 1, n_classes))[patients]
        logits = shared + patient_effect * effects + generator.normal(size=(n_bags, n_classes))
        models.append(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    return labels, *models, patients.tolist()
