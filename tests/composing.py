"""Composes the configuration as run.py does, inside the test process."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from mil_anchor.experiment import register_config

ROOT = Path(__file__).parents[1]


def composed(*overrides: str, folder: Path | None = None) -> DictConfig:
    """The configuration of ``python run.py OVERRIDES``, with Hydra's output folder set."""
    register_config()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", list(overrides), return_hydra_config=True)
    with open_dict(config.hydra):
        config.hydra.runtime.output_dir = str(folder or "unused")
        config.hydra.job.num = 0
        config.hydra.job.id = "test"
    HydraConfig.instance().set_config(config)
    OmegaConf.set_struct(config, value=False)
    config.pop("hydra")
    OmegaConf.set_struct(config, value=True)
    return config
