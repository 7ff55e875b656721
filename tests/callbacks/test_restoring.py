"""What the plug-in leaves behind: nothing, however a fit ends, and nothing for the next model."""

import pytest
import torch

from mil_anchor import AnchorCallback
from tests.callbacks.tiny import (
    assert_clean,
    assert_equal_states,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)


def test_anchor_callback__second_model__gets_a_new_anchor(tmp_path, subject):
    loader = make_loader(subject.batches())
    callback = AnchorCallback(subject.site, weight=0.5, decay=0.9)
    make_trainer(tmp_path, callback).fit(seeded_module(subject.module), loader)

    again = AnchorCallback(subject.site, weight=0.5, decay=0.9)
    trained = []
    for used in (callback, again):
        second = seeded_module(subject.module)
        make_trainer(tmp_path, used).fit(second, loader)
        trained.append(parameters_of(second) | used.state_dict()["anchor"])
        assert_clean(second)

    assert_equal_states(*trained)


def test_anchor_callback__fit_twice_on_one_trainer__trains_on_and_restores(tmp_path, subject):
    module, loader = seeded_module(subject.module), make_loader(subject.batches())
    callback = AnchorCallback(subject.site, weight=0.5, decay=0.9)
    trainer = make_trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(module, loader)
    after_first = parameters_of(module)
    trainer.fit_loop.max_epochs = 2

    trainer.fit(module, loader)

    assert any(not torch.equal(t, after_first[n]) for n, t in parameters_of(module).items())
    assert_clean(module)


@pytest.mark.parametrize("where", ["training_step", "on_train_batch_end", "validation_step"])
def test_anchor_callback__exception__leaves_the_module_as_it_was(tmp_path, subject, where):
    module, loader = seeded_module(subject.module), make_loader(subject.batches())

    def fail(*_):
        raise KeyError("broken on purpose")

    setattr(module, where, fail)
    held = vars(module)[where]

    with pytest.raises(KeyError, match="broken on purpose"):
        make_trainer(tmp_path, AnchorCallback(subject.site)).fit(module, loader, loader)

    assert vars(module).pop(where) is held
    assert_clean(module)


def test_anchor_callback__user_method_on_the_instance__is_put_back(tmp_path, subject):
    module, loader = seeded_module(subject.module), make_loader(subject.batches())
    seen = []

    def own_step(batch, batch_idx):
        seen.append(batch_idx)
        return module.loss(batch)

    module.training_step = own_step
    make_trainer(tmp_path, AnchorCallback(subject.site, weight=0.5)).fit(module, loader)

    assert module.training_step is own_step
    assert len(seen) == 12
