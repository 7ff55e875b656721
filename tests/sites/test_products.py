import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from mil_anchor import ClassTokenSite, CriticalInstanceSite, MultiheadSite
from mil_anchor.anchor import Anchor
from mil_anchor.callbacks.recorder import AttentionRecorder
from tests.sites.watching import bag, read


class Attention(nn.Module):
    """Self-attention with zeros in front, up to a multiple of four tokens."""

    def __init__(self, width=8, n_heads=2) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x):
        padded = nn.functional.pad(x, (0, 0, -x.shape[1] % 4, 0))
        q, k, v = self.qkv(padded).chunk(3, dim=-1)
        return ((q @ k.mT).softmax(dim=-1) @ v)[:, -x.shape[1] :]


class Squared(nn.Module):
    """A class token, and the first instances again up to a square number."""

    def __init__(self, width=8) -> None:
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.attention = Attention(width)
        self.repeats = True

    def forward(self, features):
        x = self.embed(features)
        missing = int(x.shape[1] ** 0.5 + 0.999) ** 2 - x.shape[1] if self.repeats else 0
        x = torch.cat([self.token.expand(len(x), -1, -1), x, x[:, :missing]], dim=1)
        return self.attention(x)[:, 0]


def _row(model, features):
    """The class token's row by the formula, in float64."""
    model = model.double()
    x = model.embed(features.double())
    tokens = torch.cat([model.token.expand(len(x), -1, -1), x], dim=1)
    q, k, _ = model.attention.qkv(tokens).chunk(3, dim=-1)
    heads = [slice(0, 4), slice(4, 8)]
    rows = [(q[:, :1, h] * k[:, 1:, h]).sum(dim=-1) / 2 for h in heads]
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("n_instances", [1, 2, 3, 4, 7, 9, 10])
def test_class_token_site__any_padding_and_repeats__gives_the_row_of_the_formula(n_instances):
    model, features = Squared(), bag(2, n_instances)
    (attention,), _ = read(model, ClassTokenSite("attention.qkv"), {"features": features})
    again = ClassTokenSite("attention.qkv", heads=2).rescore(model.attention.qkv, attention.inputs)

    assert attention.scores.shape == (2, 2, n_instances)
    assert torch.allclose(again, attention.scores, atol=1e-6)
    assert torch.allclose(attention.scores.double(), _row(model, features), atol=1e-6)


class Wrapped(nn.Linear):
    """Computes the same, but might compute anything: the keys are made."""


def _scores_and_gradients(qkv, n_instances):
    """What the site reads of a model with this projection, and the gradients of its sum."""
    torch.manual_seed(0)
    model, features = Squared().double(), bag(2, n_instances).double().requires_grad_()
    model.attention.qkv = qkv
    (attention,), _ = read(model, ClassTokenSite("attention.qkv"), {"features": features})
    weights = torch.linspace(-1, 1, attention.scores.numel()).double()
    loss = (attention.scores.flatten() * weights).sum()
    tensors = [features, *(p for p in model.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
    anchor = Anchor(qkv)
    again = anchor.apply(ClassTokenSite("attention.qkv", heads=2).rescore, attention.inputs)
    return attention.scores.detach(), gradients, again


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_instances", [1, 4, 7, 10])
def test_class_token_site__plain_projection__equals_the_row_with_keys(bias, n_instances):
    torch.manual_seed(1)
    plain = nn.Linear(8, 24, bias=bias).double()
    wrapped = Wrapped(8, 24, bias=bias).double()
    wrapped.load_state_dict(plain.state_dict())

    fast, slow = (_scores_and_gradients(qkv, n_instances) for qkv in (plain, wrapped))

    assert torch.allclose(fast[0], slow[0], rtol=1e-12, atol=1e-14)
    assert torch.allclose(fast[2], slow[2], rtol=1e-12, atol=1e-14)
    for one, other in zip(fast[1], slow[1], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-13)


def test_class_token_site__plain_projection__leaves_the_values_without_a_gradient_of_zeros():
    torch.manual_seed(0)
    model, features = Squared(), bag(1, 7)
    seen = []
    model.attention.qkv.register_full_backward_hook(lambda *_: seen.append(True))

    (attention,), _ = read(model, ClassTokenSite("attention.qkv"), {"features": features})
    attention.scores.sum().backward()

    assert not seen  # nothing goes back through the output of the projection


def _double_output(module, args, output):
    return output * 2


@pytest.mark.parametrize("wrap", ["hook", "pre_hook", "parametrized", "old_weight_norm", "forward"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_class_token_site__projection_that_is_more_than_linear__is_read_as_it_puts_out(wrap):
    torch.manual_seed(0)
    model, features = Squared().double(), bag(2, 7).double()
    qkv = model.attention.qkv
    if wrap == "hook":
        qkv.register_forward_hook(_double_output)
    elif wrap == "pre_hook":
        qkv.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    elif wrap == "parametrized":
        parametrizations.weight_norm(qkv)
        with torch.no_grad():
            qkv.parametrizations.weight.original0.mul_(2)
    elif wrap == "old_weight_norm":
        nn.utils.weight_norm(qkv)
        with torch.no_grad():
            qkv.weight_g.mul_(2)
    else:
        inner = qkv.forward
        qkv.forward = lambda x: inner(x) * 2
    expected = _row(model, features)

    (attention,), _ = read(model, ClassTokenSite("attention.qkv"), {"features": features})

    assert torch.allclose(attention.scores, expected, rtol=1e-10)


@pytest.mark.parametrize("bias", [False, True])
def test_class_token_site__autocast_of_the_models_own__gives_the_row_with_keys(bias):
    class Autocast(Squared):
        def forward(self, features):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.embed(features)
                x = torch.cat([self.token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
                return self.attention(x)[:, 0]

    site, batch = ClassTokenSite("attention.qkv", squared=False), {"features": bag(2, 7)}
    scores, gradients = [], []
    for make in (nn.Linear, Wrapped):
        torch.manual_seed(0)
        model = Autocast()
        model.attention.qkv = make(8, 24, bias=bias)
        (attention,), _ = read(model, site, batch)
        attention.scores.square().sum().backward()
        scores.append(attention.scores.float())
        gradients.append(model.attention.qkv.weight.grad)

    assert torch.allclose(*scores, rtol=0.05, atol=0.01)
    assert torch.allclose(*gradients, rtol=0.05, atol=0.05)


def test_class_token_site__global_hook__is_respected():
    torch.manual_seed(0)
    model, features = Squared().double(), bag(1, 7).double()

    def double(module, args, output):
        return output * 2 if module is model.attention.qkv else None

    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        expected = _row(model, features)
        (attention,), _ = read(model, ClassTokenSite("attention.qkv"), {"features": features})
    finally:
        handle.remove()

    assert torch.allclose(attention.scores, expected, rtol=1e-10)


def test_class_token_site__output_changed_in_place__is_refused():
    class Scaling(Attention):
        def forward(self, x):
            self.qkv(x).mul_(2)
            return x

    model = Squared()
    model.attention = Scaling()
    with pytest.raises(RuntimeError, match="has changed them in place"):
        read(model, ClassTokenSite("attention.qkv"), {"features": bag(1, 7)})


def test_class_token_site__parts_that_only_count__are_not_copied():
    model, site = Squared(), ClassTokenSite("attention.qkv")
    recorder = AttentionRecorder(model, site, only_with_grad=True)
    recorder.start()
    model(bag(1, 7))
    kept = {call.name: call.returned is not None for call in recorder.calls}
    recorder.remove()

    assert kept.pop("qkv")
    assert kept
    assert not any(kept.values())


def test_class_token_site__model_run_by_its_forward__counts_by_its_first_submodule():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Squared()
            self.forward = self.model.forward

    wrapper, features = Wrapper(), bag(1, 5)
    site = ClassTokenSite("attention.qkv").within("model")

    (attention,), _ = read(wrapper, site, {"features": features})

    assert attention.scores.shape == (1, 2, 5)
    assert torch.allclose(attention.scores.double(), _row(wrapper.model, features), atol=1e-6)


def test_class_token_site__no_repeats__must_be_told():
    model = Squared()
    model.repeats = False
    features = bag(1, 7)

    with pytest.raises(ValueError, match=r"8 tokens for 7 instances.*squared=False"):
        read(model, ClassTokenSite("attention.qkv"), {"features": features})
    site = ClassTokenSite("attention.qkv", squared=False)
    assert read(model, site, {"features": features})[0][0].scores.shape == (1, 2, 7)


def test_class_token_site__unknown_heads__asks_for_them():
    model = Squared()
    del model.attention.n_heads

    with pytest.raises(ValueError, match=r"Attention has no heads, n_heads or num_heads.*heads="):
        ClassTokenSite("attention.qkv").bound(model)
    assert ClassTokenSite("attention.qkv", heads=4).bound(model).heads == 4


def test_class_token_site__rescoring_before_it_is_bound__asks_for_the_heads():
    with pytest.raises(ValueError, match=r"heads of 'attention.qkv' must be known here"):
        ClassTokenSite("attention.qkv").rescore(nn.Linear(8, 24), ((bag(1, 4, 8),), slice(0, 4)))


class Seeds(nn.Module):
    """Learned queries attend to the instances."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.seeds = nn.Parameter(torch.randn(3, 8))
        self.batch_first = options.get("batch_first", False)
        self.attention = nn.MultiheadAttention(8, 2, kdim=5, vdim=5, **options)

    def forward(self, features, mask=None):
        queries = self.seeds.expand(len(features), -1, -1)
        order = (lambda x: x) if self.batch_first else (lambda x: x.transpose(0, 1))
        padding = None if mask is None else ~mask
        return self.attention(
            order(queries), order(features), order(features), padding, need_weights=False
        )[0]


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}])
def test_multihead_site__learned_queries__give_a_row_per_head_and_query(options):
    model, features = Seeds(**options), bag(2, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False

    (attention,), difference = read(
        model, MultiheadSite("attention"), {"features": features}, features, mask
    )

    mha = model.attention
    bias = mha.in_proj_bias if mha.in_proj_bias is not None else torch.zeros(24)
    q = model.seeds @ mha.q_proj_weight.T + bias[:8]
    k = features @ mha.k_proj_weight.T + bias[8:16]
    expected = torch.cat(
        [torch.einsum("qd,bnd->bqn", q[:, h], k[:, :, h]) / 2 for h in (slice(4), slice(4, 8))],
        dim=1,
    )
    assert torch.allclose(attention.scores, expected, atol=1e-5)
    assert torch.equal(attention.mask, mask)
    assert difference is None
    again = MultiheadSite("attention").rescore(mha, attention.inputs)
    assert torch.equal(again, attention.scores)


@pytest.mark.parametrize("fast", [True, False])
def test_multihead_site__encoder_layer_in_evaluation__is_not_bypassed(fast):
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=8, batch_first=True, dropout=0.0)
    layer.eval()
    layer.self_attn.requires_grad_(not fast)
    features = bag(1, 6, width=8)
    recorder = AttentionRecorder(
        layer, MultiheadSite("self_attn", class_token=True), only_with_grad=False
    )
    recorder.start()
    with torch.no_grad():
        layer(features)

    (attention,) = recorder.take({"features": features})
    assert attention.scores.shape == (1, 2, 5)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_multihead_site__encoder_that_leaves_padding_out__has_its_mask():
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=8, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    read_rows = []
    for nested in (True, False):
        encoder.enable_nested_tensor = nested
        site = MultiheadSite("layers.0.self_attn", class_token=True)
        recorder = AttentionRecorder(encoder, site, only_with_grad=False)
        recorder.start()
        with torch.no_grad():
            encoder(bag(2, 6, width=8), src_key_padding_mask=padding)
        (attention,) = recorder.take(None)
        recorder.remove()
        assert torch.equal(attention.mask, ~padding[:, 1:])
        read_rows.append(attention.scores.transpose(1, 2)[attention.mask])

    assert torch.allclose(*read_rows, atol=1e-6)


def test_multihead_site__other_module__is_refused():
    with pytest.raises(ValueError, match=r"must be an nn.MultiheadAttention, but it is a Linear"):
        MultiheadSite("attention.qkv").watched(Squared())


class Dual(nn.Module):
    """A query network on the instances and on the critical ones."""

    def __init__(self, times=2) -> None:
        super().__init__()
        self.times = times
        self.classes = nn.Linear(5, 2)
        self.query = nn.Sequential(nn.Linear(5, 4), nn.Tanh())

    def forward(self, features):
        features = features[0]
        critical = features[self.classes(features).argmax(dim=0)]
        queries = self.query(features)
        for _ in range(self.times - 1):
            products = queries @ self.query(critical).T / 2
        return products.softmax(dim=0).T @ features + self.classes(features).sum()


def test_critical_instance_site__query_run_twice__gives_a_row_per_class():
    model, features = Dual(), bag()
    site = CriticalInstanceSite("query")

    (attention,), difference = read(model, site, {"features": features})

    chosen = model.classes(features[0]).argmax(dim=0)
    q = torch.tanh(features[0] @ model.query[0].weight.T + model.query[0].bias)
    expected = torch.stack([(q * q[index]).sum(dim=-1) / 2 for index in chosen])
    assert torch.allclose(attention.scores[0], expected, atol=1e-6)
    assert difference is None
    # Both sides come from the copy: with its own weights on one side the gap would never close.
    again = site.rescore(model.query, attention.inputs)
    assert torch.allclose(again, attention.scores, atol=1e-6)


class Gathering(nn.Module):
    """The critical instances' queries are those of the instances: the query network runs once."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Linear(5, 2)
        self.query = nn.Sequential(nn.Linear(5, 4), nn.Tanh())

    def forward(self, features):
        index, queries = self.classes(features).argmax(dim=1), self.query(features)
        critical = torch.stack([of_bag[i] for of_bag, i in zip(queries, index, strict=True)])
        return (critical @ queries.mT / 2).softmax(dim=-1) @ features


def test_critical_instance_site__gathered_queries__take_one_pass_of_the_copy():
    torch.manual_seed(0)
    model, features = Gathering().double(), bag(2, 7).double()
    site = CriticalInstanceSite("query", classifier="classes")
    (attention,), difference = read(model, site, {"features": features})
    anchor = Anchor(model.query)
    n_calls = []
    anchor.block.register_forward_hook(lambda *_: n_calls.append(1))

    again = anchor.apply(site.rescore, attention.inputs)

    index = model.classes(features).argmax(dim=1)
    critical = torch.stack([of_bag[i] for of_bag, i in zip(features, index, strict=True)])
    two_passes = model.query(critical) @ model.query(features).mT / 2
    assert difference is None
    assert len(n_calls) == 1
    assert torch.allclose(attention.scores, two_passes, rtol=1e-12, atol=1e-14)
    assert torch.allclose(again, two_passes, rtol=1e-12, atol=1e-14)
    assert torch.equal(site.instances(attention.inputs), features)


def test_critical_instance_site__query_run_three_times__is_refused():
    with pytest.raises(
        ValueError, match=r"on the instances and on the critical ones.* called 3 times"
    ):
        read(Dual(times=3), CriticalInstanceSite("query"), {"features": bag()})


def test_sites__as_text__can_be_pasted():
    for site in (
        ClassTokenSite("a.qkv", heads=4),
        MultiheadSite("a", tap="b", class_token=True),
        CriticalInstanceSite("q", classifier="c", scale=1.0),
    ):
        assert eval(str(site)) == site
        assert eval(str(site.within("net"))) == site.within("net")
