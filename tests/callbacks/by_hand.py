"""The method written out by hand: a plain loop, and the divergence from the formulas."""

import copy

import torch


def hand_written_penalty(subject, module, anchor, batch, target):
    """KL(target(anchor scores) ‖ softmax(online scores)) over real instances, without our code."""
    hidden = subject.hidden(module, batch)
    online_scores = subject.scores(subject.block_of(module), hidden)
    with torch.no_grad():
        anchor_scores = subject.scores(anchor, hidden)
    mask = batch.get("mask", torch.ones(hidden.shape[:2], dtype=torch.bool))
    of_bags = []
    for online_raw, anchor_raw, real in zip(online_scores, anchor_scores, mask, strict=True):
        online = torch.softmax(online_raw[:, real], dim=-1)
        raw = anchor_raw[:, real]
        weights = 1 / (1 + torch.exp(-raw)) if target == "nsf" else torch.exp(raw)
        held = weights / weights.sum(dim=-1, keepdim=True)
        of_bags.append((held * (held / online).log()).sum(dim=-1))
    return torch.stack(of_bags).mean()


def hand_written_fit(subject, module, batches, *, weight, decay, target="nsf", **how):
    """The whole method as a plain loop in float64: epochs, accumulate, clip, per_epoch.

    A batch may be a tuple with one batch for each process. Returns the anchor, the mean penalty of
    the last epoch, and the module it trained.
    """
    accumulate, clip = how.get("accumulate", 1), how.get("clip")
    module = copy.deepcopy(module).double()
    block = subject.block_of(module)
    anchor = copy.deepcopy(block).eval()
    optimizer = module.configure_optimizers()

    def follow():
        with torch.no_grad():
            for mirrored, online in zip(anchor.parameters(), block.parameters(), strict=True):
                mirrored.mul_(decay).add_(online, alpha=1 - decay)

    penalties = []
    for _ in range(how.get("epochs", 2)):
        penalties = []
        for index, batch in enumerate(batches):
            of_ranks = batch if isinstance(batch, tuple) else (batch,)
            for single in of_ranks:
                own = {**single, "features": single["features"].double()}
                penalty = hand_written_penalty(subject, module, anchor, own, target)
                penalties.append(penalty.item())
                ((module.loss(own) + weight * penalty) / accumulate / len(of_ranks)).backward()
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


def assert_same_training(module, callback, reference, anchor, tolerance=1e-10):
    """The module and the callback's anchor are those of the loop written by hand."""
    for name, tensor in reference.state_dict().items():
        assert torch.allclose(module.state_dict()[name].double(), tensor, atol=tolerance), name
    state = callback.state_dict()["anchor"]
    for name, tensor in anchor.state_dict().items():
        assert torch.allclose(state[name].double(), tensor, atol=tolerance), name
