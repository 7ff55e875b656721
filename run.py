"""Train one model on one data set, with or without a plug-in: python run.py --help."""

import hydra
from omegaconf import DictConfig

from mil_anchor.experiment import register_config
from mil_anchor.sweep.search import register_search
from mil_anchor.sweep.task import task

register_config()
register_search()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float | None:
    """Compose the configuration and run it, alone or as a job of a sweep."""
    return task(config)


if __name__ == "__main__":
    main()
