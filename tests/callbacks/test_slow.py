"""SlowWeights: what is averaged, when, and that training does not notice."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from mil_anchor import AnchorCallback, AttentionMonitor
from mil_anchor.attention import log_softmax, normalized_entropy
from mil_anchor.callbacks.monitor import read_attention
from mil_anchor.callbacks.slow import SlowWeights
from tests.callbacks.tiny import (
    TinyModule,
    assert_equal_states,
    make_batches,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)

ROOT = Path(__file__).parents[2]


class Trace(Callback):
    """Keeps the training weights and the loss after every batch, and what validation sees."""

    def __init__(self) -> None:
        self.trained, self.losses, self.validated = [], [], []

    def on_train_start(self, trainer, pl_module):
        self.start = parameters_of(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.trained.append(parameters_of(pl_module))
        self.losses.append((outputs or {}).get("loss"))

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.validated.append(parameters_of(pl_module))


def _fit(folder, module, *callbacks, batches=None, **options):
    trace, loader = Trace(), make_loader(batches)
    trainer = make_trainer(folder, *callbacks, trace, **options)
    trainer.fit(module, loader, loader)
    return trace


def _expected(start, steps, decay, *, warmup=True):
    """The average by its definition, in float64."""
    slow = {name: tensor.double() for name, tensor in start.items()}
    for index, online in enumerate(steps):
        factor = min(decay, (1 + index) / (10 + index)) if warmup else decay
        for name in slow:
            slow[name] = factor * slow[name] + (1 - factor) * online[name].double()
    return slow


def _assert_close(state, expected, tolerance=1e-6):
    assert state.keys() == expected.keys()
    for name in state:
        assert torch.allclose(state[name].double(), expected[name], atol=tolerance), name


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_slow_weights__k_optimizer_steps__equal_the_definition(tmp_path, warmup, accumulate):
    module, slow = seeded_module(), SlowWeights(decay=0.6, warmup=warmup)

    trace = _fit(tmp_path, module, slow, accumulate_grad_batches=accumulate)

    # Twelve batches; the last of an epoch always steps.
    ends = range(12) if accumulate == 1 else (3, 5, 9, 11)
    steps = [trace.trained[end] for end in ends]
    expected = _expected(trace.start, steps, 0.6, warmup=warmup)
    _assert_close(slow.state_dict()["slow"], expected)
    assert slow.state_dict()["n_updates"] == {0: len(steps)}
    _assert_close(parameters_of(module), expected)


def test_slow_weights__validation__sees_the_average_and_training_never_does(tmp_path, subject):
    options = {"batches": subject.batches(), "num_sanity_val_steps": 1}
    with_slow, without = (
        _fit(tmp_path, seeded_module(subject.module), *callbacks, **options)
        for callbacks in ([SlowWeights(decay=0.9)], [])
    )

    for one, other in zip(with_slow.trained, without.trained, strict=True):
        assert_equal_states(one, other)
    assert with_slow.losses == without.losses
    sanity, first, last = (with_slow.validated[index] for index in (0, 6, -1))
    assert_equal_states(sanity, without.start)
    _assert_close(first, _expected(without.start, without.trained[:6], 0.9))
    _assert_close(last, _expected(without.start, without.trained, 0.9))


def test_slow_weights__modules_own_evaluation_hooks__see_the_average(tmp_path):
    class Looking(TinyModule):
        def on_validation_epoch_start(self):
            self.first = parameters_of(self)

        def on_validation_epoch_end(self):
            self.last = parameters_of(self)

        def on_fit_end(self):
            self.after = parameters_of(self)

    module = seeded_module(Looking)
    trace = _fit(tmp_path, module, SlowWeights(decay=0.9))

    expected = _expected(trace.start, trace.trained, 0.9)
    for seen in (module.first, module.last, module.after, parameters_of(module)):
        _assert_close(seen, expected)


def test_slow_weights__validation_inside_an_accumulation__changes_nothing(tmp_path):
    options = {"accumulate_grad_batches": 4, "val_check_interval": 1}
    with_slow, without = (
        _fit(tmp_path, seeded_module(), *callbacks, **options)
        for callbacks in ([SlowWeights()], [])
    )

    assert_equal_states(with_slow.trained[-1], without.trained[-1])


class WithStatistics(TinyModule):
    """Has batch norm, and buffers that are none of an average's business."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.full((2,), -torch.inf))
        self.register_buffer("n_validated", torch.tensor(0.0))

    def loss(self, batch):
        features = self.norm(batch["features"].flatten(0, 1)).reshape(batch["features"].shape)
        return super().loss({**batch, "features": features})

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.n_validated += 1


def test_slow_weights__buffers__are_averaged_if_statistics_and_else_the_models_own(tmp_path):
    module = seeded_module(WithStatistics)

    trace = _fit(tmp_path, module, SlowWeights(decay=0.9))

    expected, seen = _expected(trace.start, trace.trained, 0.9), trace.validated[-1]
    for name in ("norm.running_mean", "norm.running_var", "norm.weight"):
        assert torch.allclose(seen[name].double(), expected[name], atol=1e-6)
        assert not torch.equal(seen[name], trace.trained[-1][name])
    assert seen["norm.num_batches_tracked"] == 12
    assert torch.equal(module.mask, torch.full((2,), -torch.inf))
    assert module.n_validated == 12


def test_slow_weights__parameters_that_no_optimizer_owns__are_the_models_own(tmp_path):
    class Teacher(TinyModule):
        def __init__(self, **options) -> None:
            super().__init__(**options)
            self.teacher = nn.Parameter(torch.zeros(2), requires_grad=False)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

        def on_train_batch_end(self, *_):
            self.teacher += 1

    module = seeded_module(Teacher)
    _fit(tmp_path, module, SlowWeights())

    assert module.teacher.tolist() == [12, 12]


def test_slow_weights__parameter_that_joins_an_optimizer__starts_from_its_first_step(tmp_path):
    class Unfreezing(TinyModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.head.parameters(), lr=0.1)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                group = {"params": list(self.net.encoder.parameters())}
                self.optimizers().optimizer.add_param_group(group)

    module, slow = seeded_module(Unfreezing), SlowWeights(decay=0.9, warmup=False)
    trace = _fit(tmp_path, module, slow)

    late = "net.encoder.0.weight"
    expected = _expected(trace.trained[6], trace.trained[7:], 0.9, warmup=False)[late]
    assert torch.allclose(slow.state_dict()["slow"][late].double(), expected, atol=1e-6)
    assert "net.attention.0.weight" not in slow.state_dict()["slow"]


def test_slow_weights__lazy_parameters__are_averaged_from_the_first_step_on(tmp_path):
    class Lazy(TinyModule):
        def __init__(self, **options) -> None:
            super().__init__(**options)
            self.net.encoder[0] = nn.LazyLinear(8)

    module, slow = seeded_module(Lazy), SlowWeights(decay=0.9, warmup=False)
    trace = Trace()
    trainer = make_trainer(tmp_path, slow, trace, max_epochs=1)
    trace.on_train_start = lambda *_: None
    trainer.fit(module, make_loader())

    expected = _expected(trace.trained[0], trace.trained[1:], 0.9, warmup=False)
    name = "net.encoder.0.weight"
    assert torch.allclose(slow.state_dict()["slow"][name].double(), expected[name], atol=1e-6)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_slow_weights__steps_that_return_none__are_no_steps(tmp_path):
    module, slow = seeded_module(returns="none"), SlowWeights(decay=0.9)

    trace = _fit(tmp_path, module, slow)

    assert slow.state_dict()["n_updates"] == {0: 6}
    _assert_close(parameters_of(module), _expected(trace.start, trace.trained[::2], 0.9))


def test_slow_weights__two_optimizers_by_hand__each_averages_its_own_once_a_step(tmp_path):
    class Two(TinyModule):
        def __init__(self, **options) -> None:
            super().__init__(**options)
            self.automatic_optimization = False

        def configure_optimizers(self):
            parameters = list(self.parameters())
            return [torch.optim.SGD(parameters[start::2], lr=0.1) for start in (0, 1)]

        def training_step(self, batch, batch_idx):
            one, two = self.optimizers()
            one.zero_grad()
            two.zero_grad()
            self.manual_backward(self.loss(batch))
            one.step()
            if batch_idx % 2:
                two.step()

    module, slow = seeded_module(Two), SlowWeights(decay=0.9)
    trace = _fit(tmp_path, module, slow)

    assert slow.state_dict()["n_updates"] == {0: 12, 1: 6}
    every = _expected(trace.start, trace.trained, 0.9)
    second = _expected(trace.start, trace.trained[1::2], 0.9)
    expected = {name: (every, second)[index % 2][name] for index, name in enumerate(every)}
    _assert_close(parameters_of(module), expected)


def test_slow_weights__bf16_true__averages_in_float32(tmp_path):
    module, slow = seeded_module(), SlowWeights(decay=0.999, warmup=False)

    trace = _fit(tmp_path, module, slow, precision="bf16-true")

    state = slow.state_dict()["slow"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    _assert_close(state, _expected(trace.start, trace.trained, 0.999, warmup=False))
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in state.values())
    assert {tensor.dtype for tensor in trace.validated[-1].values()} == {torch.bfloat16}


@pytest.mark.parametrize("fused", [False, True])
def test_slow_weights__step_that_the_scaler_skips__is_no_step(tmp_path, fused):
    class Overflowing(TinyModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (torch.inf if batch_idx == 2 else 1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=fused)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    mixed = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    module, slow = seeded_module(Overflowing), SlowWeights(decay=0.9)

    trace = _fit(tmp_path, module, slow, plugins=[mixed], max_epochs=1)

    steps = [*trace.trained[:2], *trace.trained[3:]]
    assert slow.state_dict()["n_updates"] == {0: 5}
    _assert_close(parameters_of(module), _expected(trace.start, steps, 0.9))


@pytest.mark.parametrize("slow_first", [True, False])
def test_slow_weights__beside_an_anchor_and_the_monitor__each_sees_its_own_weights(
    tmp_path, subject, slow_first
):
    batches = subject.batches()

    def fit(name, *callbacks):
        anchor = AnchorCallback(subject.site, weight=0.5, decay=0.9)
        monitor = AttentionMonitor(subject.site, path=tmp_path / f"{name}.csv")
        module, order = seeded_module(subject.module), [*callbacks, anchor, monitor]
        trace = _fit(tmp_path, module, *order[:: 1 if slow_first else -1], batches=batches)
        return module, trace, anchor.state_dict()["anchor"]

    module, with_slow, anchor = fit("slow", SlowWeights(decay=0.9))
    _, without, anchor_without = fit("without")

    assert_equal_states(anchor, anchor_without)
    assert_equal_states(with_slow.trained[-1], without.trained[-1])
    rows = {row.bag_id: row for row in read_attention(tmp_path / "slow.csv") if row.epoch == 1}
    module.eval()
    with torch.no_grad():
        scores = subject.scores(subject.block_of(module), subject.hidden(module, batches[0]))
    mask = batches[0].get("mask")
    entropies = normalized_entropy(log_softmax(scores, mask)).mean(dim=-1)
    for bag_id, entropy in zip(batches[0]["bag_id"], entropies.tolist(), strict=True):
        assert rows[bag_id].entropy == pytest.approx(entropy, abs=1e-5)


def test_slow_weights__second_fit__starts_anew(tmp_path):
    slow = SlowWeights(decay=0.9)
    states = []
    for used in (slow, slow, SlowWeights(decay=0.9)):
        _fit(tmp_path, seeded_module(), used)
        states.append(used.state_dict())

    assert_equal_states(states[1]["slow"], states[2]["slow"])
    assert states[1]["n_updates"] == states[2]["n_updates"]


def test_slow_weights__evaluation_of_a_checkpoint_before_a_fit__leaks_nothing_into_it(tmp_path):
    trainer = make_trainer(tmp_path, SlowWeights(decay=0.9))
    trainer.fit(seeded_module(), make_loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    slow = SlowWeights(decay=0.9)
    trainer = make_trainer(tmp_path, slow, max_epochs=1)
    trainer.test(TinyModule(), make_loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)

    trainer.fit(seeded_module(), make_loader())

    fresh = SlowWeights(decay=0.9)
    make_trainer(tmp_path, fresh, max_epochs=1).fit(seeded_module(), make_loader())
    assert_equal_states(slow.state_dict()["slow"], fresh.state_dict()["slow"])
    assert slow.state_dict()["n_updates"] == {0: 6}


@pytest.mark.parametrize("breaks", [False, True])
def test_slow_weights__optimizer_used_after_the_fit__moves_them_no_more(tmp_path, breaks):
    class Breaking(TinyModule):
        def on_train_epoch_end(self):
            if breaks:
                raise KeyError("broken on purpose")

    module, slow = seeded_module(Breaking), SlowWeights(decay=0.9)
    trainer = make_trainer(tmp_path, slow)
    with pytest.raises(KeyError, match="on purpose") if breaks else nullcontext():
        trainer.fit(module, make_loader())
    before = slow.state_dict()["slow"]

    module.loss(make_batches()[0]).backward()
    trainer.optimizers[0].step()

    assert_equal_states(slow.state_dict()["slow"], before)


def test_slow_weights__decay_of_1__is_refused():
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), but got 1"):
        SlowWeights(1.0)


def test_slow_weights__state_of_another_model__is_refused(tmp_path):
    trainer = make_trainer(tmp_path, SlowWeights(), max_epochs=1)
    trainer.fit(seeded_module(), make_loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    checkpoint["callbacks"]["SlowWeights"]["slow"]["net.other"] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "other.ckpt")

    with pytest.raises(ValueError, match=r"come from the same model.*\['net.other'\]"):
        make_trainer(tmp_path, SlowWeights()).fit(
            seeded_module(), make_loader(), ckpt_path=tmp_path / "other.ckpt"
        )


def test_slow_weights__checkpoint_without_them__start_from_its_weights_and_say_so(tmp_path, caplog):
    bare = make_trainer(tmp_path, max_epochs=1)
    trained = seeded_module()
    bare.fit(trained, make_loader())
    bare.save_checkpoint(tmp_path / "bare.ckpt")
    trace = Trace()

    with caplog.at_level("INFO"):
        trainer = make_trainer(tmp_path, SlowWeights(decay=0.9), trace)
        module = TinyModule()
        trainer.fit(module, make_loader(), ckpt_path=tmp_path / "bare.ckpt")

    assert "holds no state of SlowWeights" in caplog.text
    assert_equal_states(trace.start, parameters_of(trained))
    _assert_close(parameters_of(module), _expected(trace.start, trace.trained, 0.9))


def _ddp(folder, epochs, checkpoint=None):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.callbacks.slow_ddp_fit", folder, epochs]
    command += [checkpoint] if checkpoint else []
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}_after{epochs}.pt") for rank in range(2)]


@pytest.mark.slow
def test_slow_weights__two_processes_stopped_and_resumed__equal_the_uninterrupted_run(tmp_path):
    whole = _ddp(tmp_path / "whole", 4)
    _ddp(tmp_path / "halves", 2)
    resumed = _ddp(tmp_path / "halves", 4, tmp_path / "halves" / "last.ckpt")

    # Batch norm has seen other bags on each process; the evaluated weights are the same.
    assert_equal_states(whole[0]["validated"], whole[1]["validated"])
    assert_equal_states(whole[0]["module"], whole[1]["module"])
    assert "norm.running_mean" in whole[0]["slow"]
    for one, other in zip(whole, resumed, strict=True):
        for entry in ("module", "slow", "validated", "online"):
            assert_equal_states(one[entry], other[entry])
