"""Statistics of paired runs: two models on the same slides, with the same seeds and folds.

Within a run the cases are bags, or patients where they are given: `delong_test`,
`permutation_test`, `bootstrap_interval`. Over runs the cases are runs: `paired_test` takes one
difference for each seed, `combine_p_values` one p-value for each run, `holm` one for each data set.
The predictions of several seeds for a slide are no further slides: no function takes them together.
"""

from mil_anchor.stats.bootstrap import Bootstrap, bootstrap_interval
from mil_anchor.stats.delong import DeLong, delong_test
from mil_anchor.stats.measures import auroc, macro_f1
from mil_anchor.stats.p_values import combine_p_values, holm
from mil_anchor.stats.permutation import PermutationTest, permutation_test
from mil_anchor.stats.seeds import PairedTest, paired_test

__all__ = [
    "Bootstrap",
    "DeLong",
    "PairedTest",
    "PermutationTest",
    "auroc",
    "bootstrap_interval",
    "combine_p_values",
    "delong_test",
    "holm",
    "macro_f1",
    "paired_test",
    "permutation_test",
]
