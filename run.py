"""Train one model on one data set, with or without a plug-in: python run.py --help."""

import warnings

import hydra
from omegaconf import DictConfig

from mil_anchor.experiment import register_config, run

register_config()
# Raised inside Lightning for every batch that it moves; nothing a user can change.
warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """Compose the configuration and run it."""
    run(config)


if __name__ == "__main__":
    main()
