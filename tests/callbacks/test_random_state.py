import pytest
import torch

from mil_anchor import RandomState
from tests.callbacks.tiny import TinyModule, make_loader, make_trainer, seeded_module


def _checkpoint_of_two_processes(tmp_path):
    trainer = make_trainer(tmp_path, RandomState())
    trainer.fit(seeded_module(), make_loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    checkpoint["callbacks"]["RandomState"]["processes"] *= 2
    torch.save(checkpoint, tmp_path / "two.ckpt")


def test_random_state__other_number_of_processes__is_refused_in_fit(tmp_path):
    _checkpoint_of_two_processes(tmp_path)
    trainer = make_trainer(tmp_path, RandomState(), max_epochs=3)

    with pytest.raises(RuntimeError, match="as many processes as it had, 2, but this one has 1"):
        trainer.fit(TinyModule(), make_loader(), ckpt_path=tmp_path / "two.ckpt")


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_random_state__evaluation__leaves_the_random_state_alone(tmp_path):
    _checkpoint_of_two_processes(tmp_path)
    drawn = []
    for callbacks in ([], [RandomState()]):
        trainer = make_trainer(tmp_path, *callbacks)
        module = TinyModule()
        torch.manual_seed(7)
        trainer.test(module, make_loader(), ckpt_path=tmp_path / "two.ckpt", verbose=False)
        drawn.append(torch.rand(3))

    assert torch.equal(*drawn)
