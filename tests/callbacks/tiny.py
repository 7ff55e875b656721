"""Tiny models and data that the callback tests share, and the method written out by hand."""

import copy

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


class TinyModule(LightningModule):
    """Automatic optimisation; `returns` chooses what training_step gives back."""

    def __init__(self, *, returns="tensor", dropout=0.3) -> None:
        super().__init__()
        self.net = TinyMIL(dropout)
        self.returns = returns

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch["features"]), batch["label"])

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


def hand_written_penalty(module, anchor, features, target):
    """KL(target(anchor scores) ‖ softmax(online scores)) from the formulas, without our code."""
    hidden = module.net.encoder(features)
    online = torch.softmax(module.net.attention(hidden).transpose(1, 2), dim=-1)
    with torch.no_grad():
        raw = anchor(hidden).transpose(1, 2)
        weights = 1 / (1 + torch.exp(-raw)) if target == "nsf" else torch.exp(raw)
        held = weights / weights.sum(dim=-1, keepdim=True)
    return (held * (held / online).log()).sum(dim=-1).mean()


def hand_written_fit(module, batches, *, weight, decay, target="nsf", **how):
    """The whole method as a plain loop in float64: epochs, accumulate, clip, per_epoch.

    A batch may be a tuple with one batch for each process. Returns the anchor, the mean penalty of
    the last epoch, and the module it trained.
    """
    accumulate, clip = how.get("accumulate", 1), how.get("clip")
    module = copy.deepcopy(module).double()
    anchor = copy.deepcopy(module.net.attention).eval()
    optimizer = module.configure_optimizers()

    def follow():
        with torch.no_grad():
            for mirrored, online in zip(
                anchor.parameters(), module.net.attention.parameters(), strict=True
            ):
                mirrored.mul_(decay).add_(online, alpha=1 - decay)

    penalties = []
    for _ in range(how.get("epochs", 2)):
        penalties = []
        for index, batch in enumerate(batches):
            of_ranks = batch if isinstance(batch, tuple) else (batch,)
            for own in of_ranks:
                features = own["features"].double()
                loss = nn.functional.cross_entropy(module.net(features), own["label"])
                penalty = hand_written_penalty(module, anchor, features, target)
                penalties.append(penalty.item())
                ((loss + weight * penalty) / accumulate / len(of_ranks)).backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(batches):
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                if not how.get("per_epoch"):
                    follow()
        if how.get("per_epoch"):
            follow()
    return anchor, sum(penalties) / len(penalties), module
