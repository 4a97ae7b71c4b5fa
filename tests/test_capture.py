"""The lazy door: one graph for all lengths, the process unchanged, nothing wrong in silence."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

import rewriter
from rewriter.capture import capturing
from rewriter.reading import Index, Reader
from rewriter.report import Report
from rewriter.rules import RULES

FUSE = "fuse(from_scores=0)"
WIDTH = 8


class Attention(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        score = q @ k.mT * 0.5
        if pad is not None:
            score = score.masked_fill(~pad[:, None, None, :], -1e30)
        i, j = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])[None]
        score = score.masked_fill(j > i, -1e30)
        return (score.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Two layers in a list, with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.between = between

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        x = x + self.layers[0](x, pad)
        return x + self.layers[1](self.between(x), pad)


def tokens(batch: int = 2, length: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return torch.randn(batch, length, WIDTH, generator=generator, dtype=dtype)


def assert_same(model: nn.Module, original: nn.Module, *inputs: Any) -> Report:
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), original(*inputs), rtol=1e-5, atol=1e-6)
    return rewriter.report_of(model)


# --- graphs ---------------------------------------------------------------------------------------


def test_one_graph_serves_every_batch_and_length() -> None:
    original = Model()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    for batch, length in ((2, 7), (3, 12), (2, 33), (5, 4)):
        report = assert_same(model, original, tokens(batch, length))
        assert report.graphs == 1
    for batch, length in ((2, 1), (1, 6)):
        report = assert_same(model, original, tokens(batch, length))
    assert report.graphs <= 3


@pytest.mark.filterwarnings("ignore:.*Graph break.*")
@pytest.mark.parametrize("how", ["graph_break", "item"])
def test_sites_of_several_graphs_keep_their_path_from_the_root(how: str) -> None:
    def between(x: Tensor) -> Tensor:
        if how == "graph_break":
            torch._dynamo.graph_break()
        elif how == "item" and x.sum().item() > 1e9:
            return x * 2
        return x

    original = Model(between)
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    report = assert_same(model, original, tokens())
    assert report.graphs >= 2
    assert {s.site.path for s in report.rewritten} == {"layers.0", "layers.1"}
    assert report.notes == ()


def test_layers_that_share_a_graph_give_the_same_numbers() -> None:
    """Dynamo captures a layer with a graph break once, and calls it with each layer's weights."""

    class Broken(Attention):
        def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
            x = super().forward(x, pad)
            torch._dynamo.graph_break()
            return super().forward(x, pad)

    original = Model()
    original.layers = nn.ModuleList(Broken() for _ in range(2))
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    report = assert_same(model, original, tokens())
    assert {s.site.path for s in report.rewritten} == {"layers.0"}
    assert {s.decision for s in report.attention} == {"rewritten"}


def test_a_view_as_input_is_captured() -> None:
    original = Model()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    report = assert_same(model, original, tokens(4, 7)[1:3])
    assert len(report.rewritten) == 2


def test_a_forward_that_cannot_be_captured_still_runs() -> None:
    class Closed(Model):
        @torch.compiler.disable
        def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
            return super().forward(x, pad)

    original = Closed()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    report = assert_same(model, original, tokens())
    assert report.rewritten == ()
    with pytest.raises(rewriter.errors.CaptureError, match="captured no graph of Closed"):
        rewriter.inspect(Closed(), tokens())


# --- modes ----------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_original() -> None:
    original = Model().double().train()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    pad = torch.ones(2, 7, dtype=torch.bool)
    pad[1, 4:] = False
    for each in (original, model):
        each(tokens(dtype=torch.float64), pad).square().sum().backward()
    assert len(rewriter.report_of(model).rewritten) == 2
    for expected, found in zip(original.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-12)


def test_gradient_modes_do_not_mix() -> None:
    original = Model()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    with torch.no_grad():
        assert not model(tokens()).requires_grad
    assert model(tokens()).requires_grad
    with torch.inference_mode():
        assert not model(tokens()).requires_grad
    model.requires_grad_(False)
    assert not model(tokens()).requires_grad


def test_a_detached_bias_gets_no_gradient() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(WIDTH, WIDTH)
            self.bias = nn.Parameter(torch.randn(7, 7))

        def forward(self, x: Tensor) -> Tensor:
            return (self.q(x) @ x.mT + self.bias.detach()).softmax(-1) @ x

    model = rewriter.optimize(Biased(), FUSE)
    model(tokens()).sum().backward()
    assert len(rewriter.report_of(model).rewritten) == 1
    assert model.q.weight.grad is not None
    assert model.bias.grad is None


class Frozen(nn.Module):
    """Attention of which some parts record no gradient."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        with torch.set_grad_enabled(self.part != "scores"):
            score = q @ k.mT
        with torch.set_grad_enabled(self.part != "bias"):
            bias = self.bias * torch.arange(x.shape[1])
        with torch.set_grad_enabled(self.part != "keys"):
            k = k * 0.5
        score = q @ k.mT if self.part == "keys" else score
        return (score + bias).softmax(-1) @ x


@pytest.mark.parametrize(
    ("part", "rewritten", "frozen"),
    [
        ("scores", 0, {"q.weight", "k.weight"}),
        ("bias", 1, {"bias"}),
        ("keys", 0, {"k.weight"}),
        ("none", 1, set()),
    ],
)
def test_what_records_no_gradient_gets_none(part: str, rewritten: int, frozen: set[str]) -> None:
    model = rewriter.optimize(Frozen(part), FUSE)
    model(tokens()).sum().backward()
    assert len(rewriter.report_of(model).rewritten) == rewritten
    without = {n for n, p in model.named_parameters() if p.grad is None and "weight" in n}
    without |= {"bias"} if model.bias.grad is None else set()
    assert without == frozen


def test_regions_without_gradients_do_not_matter_where_none_are_recorded() -> None:
    model = rewriter.optimize(Frozen("scores"), FUSE)
    with torch.no_grad():
        model(tokens())
    assert len(rewriter.report_of(model).rewritten) == 1


def test_an_attention_under_autocast_gives_the_dtype_of_autocast() -> None:
    class Casting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return (x @ x.mT).softmax(-1) @ x

    model = rewriter.optimize(Casting(), FUSE)
    assert model(tokens()).dtype == Casting()(tokens()).dtype == torch.bfloat16
    assert len(rewriter.report_of(model).rewritten) == 1


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast_gives_the_dtype_and_the_precision_of_the_original(where: str) -> None:
    class Casting(Model):
        def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x, pad)

    original = Casting() if where == "inside" else Model()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    context = torch.autocast("cpu", torch.bfloat16) if where == "outside" else nullcontext()
    with torch.no_grad(), context:
        expected, found = original(tokens()), model(tokens())
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)
    assert not any("internal error" in n for n in rewriter.report_of(model).notes)


def test_what_the_caller_does_to_an_output_does_not_come_back() -> None:
    original = Model()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    with torch.no_grad():
        model(tokens()).zero_()
    assert_same(model, original, tokens())


# --- the process and the model --------------------------------------------------------------------


def _settings() -> dict[str, Any]:
    config = torch._dynamo.config
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # some settings are deprecated, and say so when they are read
        values = {name: getattr(config, name) for name in sorted(config._config)}
    return values | {
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
    }


def test_a_call_leaves_the_settings_of_the_process_as_they_were() -> None:
    before = _settings()
    random = torch.get_rng_state()
    model = rewriter.optimize(Model(), FUSE)
    random = torch.get_rng_state()
    with torch.no_grad():
        model(tokens())
        assert _settings() == before | {"grad": False}
    model(tokens(3, 9))
    rewriter.restore(model)
    assert _settings() == before
    assert torch.equal(torch.get_rng_state(), random)


def test_an_error_in_a_call_leaves_the_settings_as_they_were() -> None:
    before = _settings()
    model = rewriter.optimize(Model(), FUSE)
    with pytest.raises(Exception, match=r".+"):
        model(torch.zeros(2, 7, WIDTH + 1))
    assert _settings() == before
    assert_same(model, copy.deepcopy(rewriter.restore(copy.deepcopy(model))), tokens())


def test_the_state_of_the_model_is_untouched() -> None:
    model = Model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    members = {name: set(vars(m)) for name, m in model.named_modules()}
    rewriter.optimize(model, FUSE)(tokens())
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    rewriter.restore(model)
    after = {name: set(vars(m)) - {"_compiled_call_impl"} for name, m in model.named_modules()}
    assert after == members


def test_restore_gives_the_original_bits() -> None:
    model = Model()
    with torch.no_grad():
        before = model(tokens())
        rewriter.optimize(model, FUSE)(tokens())
        rewriter.restore(model)
        assert torch.equal(model(tokens()), before)
    assert rewriter.report_of(model).graphs == 0


def test_optimizing_twice_is_optimizing_once() -> None:
    original = Model()
    model = copy.deepcopy(original)
    rewriter.optimize(rewriter.optimize(model, FUSE), FUSE)
    report = assert_same(model, original, tokens())
    assert (report.graphs, len(report.rewritten)) == (1, 2)


def test_a_copy_of_an_optimized_model_computes_with_its_own_weights() -> None:
    model = rewriter.optimize(Model(), FUSE)
    with torch.no_grad():
        before = model(tokens())
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.mul_(2.0)
        assert not torch.allclose(other(tokens()), before)
        assert torch.equal(model(tokens()), before)


def test_weights_that_change_are_seen() -> None:
    original = Model()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    assert_same(model, original, tokens())
    with torch.no_grad():
        for each in (original, model):
            for parameter in each.parameters():
                parameter.mul_(1.5)
    report = assert_same(model, original, tokens())
    assert report.graphs == 1


# --- mistakes of ours -----------------------------------------------------------------------------


@contextmanager
def changed_rule(monkeypatch: pytest.MonkeyPatch, name: str, rule: Any) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setitem(RULES, name, rule)
        yield


def test_a_wrong_rule_is_noticed_and_the_mask_read_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(r: Reader, node: torch.fx.Node, index: Index) -> Any:
        return sympy.Lt(index[-1], index[-2])

    original = Model()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    with changed_rule(monkeypatch, "aten.gt", wrong):
        report = assert_same(model, original, tokens())
    for site in report.rewritten:
        assert any("did not pass its check" in note for note in site.site.notes)
        assert "gt[q, k]" in str(site.site.spec)
    assert len(report.rewritten) == 2


def test_a_wrong_rule_for_the_scores_leaves_the_site_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(r: Reader, node: torch.fx.Node, index: Index) -> Any:
        return 2 * r.number(node.args[0], index, node) * r.number(node.args[1], index, node)

    original = Model()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    with changed_rule(monkeypatch, "aten.mul", wrong):
        report = assert_same(model, original, tokens())
    assert report.rewritten == ()
    assert all("did not pass its check" in s.reason for s in report.attention)
    assert len(report.attention) == 2


def test_a_rule_that_fails_leaves_the_site_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(r: Reader, node: torch.fx.Node, index: Index) -> Any:
        raise ZeroDivisionError("no such luck")

    original = Model()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    with changed_rule(monkeypatch, "aten.masked_fill", failing):
        report = assert_same(model, original, tokens())
    assert [s.decision for s in report.attention] == ["kept", "kept"]
    assert all("no such luck" in s.reason for s in report.attention)


def test_a_crash_in_lifting_leaves_the_site_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("s77")

    original = Model()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    with monkeypatch.context() as patch:
        patch.setattr("rewriter.finish.canonical", failing)
        report = assert_same(model, original, tokens())
    assert [s.decision for s in report.sites] == ["kept", "kept"]


def test_sdpa_in_a_function_of_the_module_is_found() -> None:
    class Fused(Attention):
        def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
            return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))

    original = Fused()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    report = assert_same(model, original, tokens())
    assert [str(s.site.spec) for s in report.rewritten] == ["softmax( s ) · v, s = 0.353553·q·k"]


def test_the_filters_of_warnings_are_as_before_even_where_calls_nest() -> None:
    """A call within a call compiles too; its filters must not outlive the outer ones."""
    before = list(warnings.filters)
    with capturing(), capturing():
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
    assert warnings.filters == before
    with capturing():
        torch.compile(lambda x: x - 1, backend="eager")(torch.ones(3))
        assert warnings.filters == before


# --- what torch cannot trace ----------------------------------------------------------------------


class OtherwiseCompiled(Model):
    """Its first layer gives more tokens under a compiler, which the second does not take."""

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        return self._second(self._first(x, pad), x, pad)

    def _first(self, x: Tensor, pad: Tensor | None) -> Tensor:
        x = self.layers[0](x, pad)
        return torch.cat([x, x], 1) if torch.compiler.is_compiling() else x

    def _second(self, x: Tensor, y: Tensor, pad: Tensor | None) -> Tensor:
        return y + self.layers[1](x + y, pad)


def test_a_model_that_fails_under_a_compiler_alone_runs_as_it_was_and_the_report_says_so() -> None:
    original = OtherwiseCompiled().eval()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    x = tokens()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(x), original(x))
        notes = "\n".join(rewriter.inspect(model).notes)
        assert "runs as it was" in notes
        assert "must match the size" in notes
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(x[..., :3])  # the model's own words


def test_a_pass_that_changes_the_function_is_not_given_up_in_silence() -> None:
    model = rewriter.optimize(OtherwiseCompiled().eval(), "sparse.window(window=2)")
    with torch.no_grad(), pytest.raises(Exception, match="must match the size"):
        model(tokens())


def test_a_model_in_training_that_fails_under_a_compiler_is_not_run_twice() -> None:
    model = rewriter.optimize(OtherwiseCompiled().train(), FUSE)
    with pytest.raises(Exception, match="must match the size"):
        model(tokens())


class Unlikely(Model):
    """Torch's fake tensors fail between its layers, and real ones do not."""

    def __init__(self) -> None:
        super().__init__(between=self._cut)

    @staticmethod
    def _cut(x: Tensor) -> Tensor:
        return x.reshape(3, *x.shape) if torch.compiler.is_compiling() else x


@pytest.mark.parametrize("level", ["DEBUG", "ERROR"])
def test_code_that_fails_on_fake_tensors_runs_as_it_was_and_the_rest_is_rewritten(
    level: str, caplog: pytest.LogCaptureFixture
) -> None:
    original = Unlikely().eval()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    with torch.no_grad(), caplog.at_level(level, logger="torch"):
        torch.testing.assert_close(model(tokens()), original(tokens()))
    report = rewriter.inspect(model)
    assert len(report.rewritten) >= 1
    assert any("torch cannot trace" in note for note in report.notes)


class Pairs(Attention):
    """Images come in pairs, and each attends to the other one of its pair."""

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        other = x.reshape(-1, 2, length, width).flip(1).reshape(batch, length, width)
        q = self.q(x).unflatten(-1, (2, -1)).transpose(1, 2)
        k, v = (p(other).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.k, self.v))
        return ((q @ k.mT * 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Tied(nn.Module):
    """Codes of one sequence are four rows, which are told of one text."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, codes: Tensor, text: Tensor) -> Tensor:
        length, width = codes.shape[1:]
        x = codes.reshape(codes.shape[0] // 4, 4, length, width).sum(1)
        q = self.q(x).unflatten(-1, (2, -1)).transpose(1, 2)
        k, v = (p(text).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.k, self.v))
        return ((q @ k.mT * 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_a_size_that_torch_knows_under_two_names_is_one() -> None:
    original = Pairs().eval()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    for batch in (4, 6):
        assert len(assert_same(model, original, tokens(batch)).rewritten) == 1
    tied = Tied().eval()
    model = rewriter.optimize(copy.deepcopy(tied), FUSE)
    for batch in (3, 5):
        report = assert_same(model, tied, tokens(4 * batch), tokens(batch, 9))
        assert len(report.rewritten) == 1


class Joint(nn.Module):
    """Text, some of it padding, and the tokens of an image after it are one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, text: Tensor, image: Tensor, pad: Tensor) -> Tensor:
        seen = torch.cat([pad, pad.new_ones(image.shape[:2])], 1)
        q, k, v = (
            p(torch.cat([text, image], 1)).unflatten(-1, (2, -1)).transpose(1, 2)
            for p in (self.inner.q, self.inner.k, self.inner.v)
        )
        return F.scaled_dot_product_attention(q, k, v, seen[:, None, None, :])


def test_two_lengths_of_one_sequence_are_told_apart() -> None:
    original = Joint().eval()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    for first, second in ((7, 16), (4, 9), (12, 5)):
        pad = torch.arange(first) < torch.tensor([[first], [first - 3]])
        report = assert_same(model, original, tokens(2, first), tokens(2, second), pad)
    assert (report.graphs, len(report.rewritten), report.notes) == (1, 1, ())
    assert not report.rewritten[0].site.notes


class Scanned(Attention):
    """Attention after a sum over tokens that is written with vmap inside."""

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        weights = torch.vmap(lambda row: row.softmax(0))(self.q(x).flatten(1))
        return super().forward(x + weights.view_as(x), pad)


def test_gradients_flow_through_a_region_of_vmap() -> None:
    original = Scanned()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    for module in (original, model):
        module(tokens()).square().sum().backward()
    assert len(rewriter.inspect(model).rewritten) == 1
    for (name, x), y in zip(original.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(y.grad, x.grad, msg=lambda text, name=name: f"{name}: {text}")
