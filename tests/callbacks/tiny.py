"""A tiny model, its data and its Trainer, which the callback tests share."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader


class TinyMIL(nn.Module):
    """Encoder with dropout, an attention block that returns raw scores, a head."""

    def __init__(self, dropout=0.3) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout))
        self.attention = nn.Sequential(
            nn.Linear(8, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 2)
        )
        self.head = nn.Linear(8, 2)
        with torch.no_grad():  # far from uniform, so that the divergence matters
            self.attention[-1].weight.mul_(8)

    def forward(self, features):
        hidden = self.encoder(features)
        weights = torch.softmax(self.attention(hidden), dim=1)
        return self.head(torch.einsum("bnr,bnh->bh", weights, hidden) / 2)


class Recipe(LightningModule):
    """How the tests train: a subclass has a `loss`; `returns` is what training_step gives back."""

    def __init__(self, *, returns="tensor") -> None:
        super().__init__()
        self.returns = returns

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if self.returns == "dict":
            return {"loss": loss, "extra": 1}
        if self.returns == "none" and batch_idx % 2:
            return None
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=len(batch["label"]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch), batch_size=len(batch["label"]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class TinyModule(Recipe):
    """Trains the tiny model."""

    def __init__(self, *, dropout=0.3, **options) -> None:
        super().__init__(**options)
        self.net = TinyMIL(dropout)

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch["features"]), batch["label"])


def seeded_module(cls=TinyModule, **options):
    """A module with always the same weights; the random state afterwards is the same too."""
    torch.manual_seed(0)
    module = cls(**options)
    torch.manual_seed(1)
    return module


def make_batches(n_batches=6, n_bags=2, n_instances=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "features": torch.randn(n_bags, n_instances, 4, generator=generator),
            "label": torch.randint(0, 2, (n_bags,), generator=generator),
            "bag_id": [f"bag{index}_{bag}" for bag in range(n_bags)],
        }
        for index in range(n_batches)
    ]


def make_loader(batches=None, *, shuffle=False):
    return DataLoader(batches or make_batches(), batch_size=None, shuffle=shuffle)


def make_trainer(folder, *callbacks, **options):
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def parameters_of(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_clean(module):
    """No method of an instance and no hook is left on the module."""
    assert "training_step" not in vars(module)
    assert "manual_backward" not in vars(module)
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
