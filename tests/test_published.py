from collections import Counter

import pytest
from hydra.utils import get_class

from mil_anchor.published import Counterpart, published


def test_published__numbers__are_those_of_the_notes():
    values = Counter((one.data, one.method, one.quantity) for one in published())
    by_key = {(one.data, one.method, one.quantity): one.value for one in published()}

    # The ablation repeats the F1 of the whole model; nothing else comes twice.
    assert {key for key, count in values.items() if count > 1} == {("bracs", "ASMIL", "F1")}
    assert by_key["camelyon17", "ASMIL", "F1"] == 0.689
    assert by_key["bracs", "ABMIL +Anchor+NSF", "F1"] == 0.753
    gain = by_key["bracs", "ABMIL +Anchor+NSF", "F1"] / by_key["bracs", "ABMIL", "F1"] - 1
    assert gain == pytest.approx(0.1073, abs=1e-4)
    ratios = [
        by_key["bracs", f"{method} with anchor", "s/epoch, ratio"]
        for method in ("CLAM-SB", "TransMIL", "DSMIL", "ABMIL")
    ]
    assert ratios == [1.19, 1.21, 1.02, 1.23]
    assert by_key["bracs", "dropping only", "AUC"] == 0.868
    assert by_key["musk2", "ASMIL", "accuracy"] == 0.968
    assert by_key["GBMLGG", "ASMIL", "C-index"] == 0.8036
    assert by_key["camelyon16", "AEM", "AUC"] == 0.974
    assert all(one.source.startswith(("ASMIL (arXiv", "AEM (arXiv")) for one in published())


def test_published__counterparts__name_models_that_are_here():
    for one in published():
        if isinstance(one.ours, Counterpart):
            get_class(one.ours.model)
