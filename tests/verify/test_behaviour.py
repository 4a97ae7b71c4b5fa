"""Behaviour is measured: KL, top-1, cosines, probes; padding is left out, and NaN is said."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter.errors import InputError
from rewriter.verify.behaviour import behaviour

V = 5


class Table(nn.Module):
    """Logits of each token from a table; hidden states on the side."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, V)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.shift = shift

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.embed(input_ids)
        logits = self.head(hidden)
        if attention_mask is not None:  # what stands at padded places is nobody's business
            logits = logits + self.shift * (1 - attention_mask)[..., None] * torch.arange(V)
        return {"logits": logits, "last_hidden_state": hidden, "attentions": hidden}


def tokens() -> dict[str, Tensor]:
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 1, 2]])
    return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])}


class Returns(nn.Module):
    """Gives what it was made with, whatever comes in."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.outputs


def test_a_model_beside_itself_has_no_divergence_and_a_note() -> None:
    model = Table()
    found = behaviour(model, model, tokens())
    (row,) = found.predictions
    assert (row.places, row.compared, row.kl_mean, row.kl_max, row.top1) == (6, 6, 0, 0, 1)
    (state,) = found.vectors  # and no attention weights
    assert (state.name, state.moved) == ("last_hidden_state", 0)
    assert state.cosine_mean == pytest.approx(1)
    assert found.notes == ("original and model are one object on which nothing is installed",)


def test_divergence_is_that_of_the_formula_in_nats() -> None:
    x = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]])
    y = torch.tensor([[[2.0, 1.0, 0.0], [3.0, 0.0, 0.0]]])
    found = behaviour(Returns({"logits": x}), Returns({"logits": y}), torch.ones(1))
    p, q = x.softmax(-1)[0, 0].tolist(), y.softmax(-1)[0, 0].tolist()
    want = sum(a * (torch.tensor(a / b).log().item()) for a, b in zip(p, q, strict=True))
    assert found.predictions[0].kl_max == pytest.approx(want, rel=1e-5)
    assert found.kl == pytest.approx(want / 2, rel=1e-5)
    assert found.top1 == 0.5


def test_it_is_the_divergence_of_the_model_from_the_original_not_the_other_way() -> None:
    x = Returns({"logits": torch.tensor([[0.0, 4.0, 0.0]])})
    y = Returns({"logits": torch.tensor([[0.0, 1.0, 2.0]])})
    there, back = (behaviour(a, b, torch.ones(1)).kl for a, b in ((x, y), (y, x)))
    assert abs(there - back) > 0.1


def test_padded_places_are_left_out() -> None:
    found = behaviour(Table(), Table(shift=9.0), tokens())
    assert found.kl == 0.0
    assert found.predictions[0].places == found.vectors[0].places == 6
    unmasked = {"input_ids": tokens()["input_ids"]}
    assert behaviour(Table(), Table(shift=9.0), unmasked).predictions[0].places == 8


def test_a_mask_of_a_decoder_is_its_own_and_one_over_a_cache_ends_with_the_tokens() -> None:
    x = Returns({"logits": torch.randn(2, 3, V), "encoder_last_hidden_state": torch.randn(2, 4, 2)})
    given = {
        "input_ids": torch.ones(2, 4),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
        "decoder_input_ids": torch.ones(2, 3),
    }
    found = behaviour(x, copy.deepcopy(x), given)
    assert (found.predictions[0].places, found.vectors[0].places) == (6, 5)
    given["decoder_attention_mask"] = torch.tensor([[1, 0, 0], [1, 1, 1]])
    assert behaviour(x, copy.deepcopy(x), given).predictions[0].places == 4
    cached = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])}
    assert behaviour(x, copy.deepcopy(x), cached).predictions[0].places == 4
    short = {"attention_mask": torch.ones(2, 2)}
    note = "logits [2, 3, 5] does not fit the mask [2, 2]: all count"
    assert note in behaviour(x, copy.deepcopy(x), short).notes


def test_an_encoder_is_measured_by_the_angle_of_its_states() -> None:
    x = {"last_hidden_state": torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), "pooler": torch.eye(2)}
    y = {"last_hidden_state": torch.tensor([[[0.0, 1.0], [0.0, 2.0]]]), "pooler": torch.zeros(2, 2)}
    found = behaviour(Returns(x), Returns(y), torch.ones(1))
    first, second = found.vectors
    assert (first.cosine_mean, first.cosine_min) == (0.5, 0.0)
    assert first.moved == pytest.approx(2**0.5 / 2 / 1.5)
    assert (second.cosine_mean, second.moved) == (0.0, 1.0)  # no direction where there was one
    zeros = behaviour(Returns(y), Returns(copy.deepcopy(y)), torch.ones(1))
    assert zeros.vectors[1].cosine_mean == 1.0


def test_a_bare_tensor_is_a_state_unless_it_is_said_to_be_logits() -> None:
    x, y = Returns(torch.randn(2, 3)), Returns(torch.randn(2, 3))
    assert behaviour(x, y, torch.ones(1)).predictions == ()
    found = behaviour(x, y, torch.ones(1), logits="output")
    assert found.vectors == ()
    assert found.kl > 0
    with pytest.raises(InputError, match="there is no output 'scores'; the outputs are output"):
        behaviour(x, y, torch.ones(1), logits="scores")


# --- probes --------------------------------------------------------------------------------------


def test_probes_read_numbers_and_tensors() -> None:
    x = Returns({"logits": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    y = Returns({"logits": torch.tensor([[1.0, 2.0], [3.0, 8.0]])})
    probes = {
        "largest": lambda out: float(out["logits"].max()),
        "first": lambda out: out["logits"][:, 0],
        "last": lambda out: out["logits"][:, 1],
        "count": lambda out: len(out["logits"]),
    }
    largest, first, last, count = behaviour(x, y, torch.ones(1), probes).probes
    assert (largest.original, largest.model, largest.difference) == (4.0, 8.0, 4.0)
    assert (first.numbers, first.difference, first.largest) == (2, 0.0, 0.0)
    assert (last.original, last.model, last.difference, last.largest) == (3.0, 5.0, 2.0, 4.0)
    assert count.original == 2.0


def test_a_probe_alone_is_enough() -> None:
    found = behaviour(
        Returns({"ids": torch.tensor([3])}),
        Returns({"ids": torch.tensor([4])}),
        torch.ones(1),
        {"id": lambda out: out["ids"]},
    )
    assert (found.predictions, found.vectors, found.probes[0].difference) == ((), (), 1.0)


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (lambda out: out["lost"], "probe 'p' raises KeyError: 'lost'"),
        (lambda out: None, "probe 'p' gives NoneType; it has to give a number"),
        (lambda out: torch.ones(0), r"probe 'p' gives a tensor \[0\]"),
        (lambda out: out["logits"][out["logits"] > 0], r"gives \[4\] for the original and \[3\]"),
    ],
)
def test_a_probe_that_fails_is_named(probe: Any, message: str) -> None:
    x, y = torch.ones(2, 2), torch.ones(2, 2)
    y[0, 0] = -1
    with pytest.raises(InputError, match=message):
        behaviour(Returns({"logits": x}), Returns({"logits": y}), torch.ones(1), {"p": probe})


# --- what cannot be measured ---------------------------------------------------------------------


def test_nothing_to_measure_is_an_error_with_the_way_out() -> None:
    x = Returns({"ids": torch.tensor([1, 2]), "name": "x"})
    message = r"nothing to measure: the original gives ids \[2\]; give probes="
    with pytest.raises(InputError, match=message):
        behaviour(x, copy.deepcopy(x), torch.ones(1))
    with pytest.raises(InputError, match="gives no tensor; give probes="):
        behaviour(Returns(None), Returns(None), torch.ones(1))
    hidden = tokens() | {"attention_mask": torch.zeros(2, 4, dtype=torch.long)}
    with pytest.raises(InputError, match="hides every place of logits"):
        behaviour(Table(), Table(), hidden)
    other = Returns({"logits": torch.ones(2, 3)}), Returns({"logits": torch.ones(2, 4)})
    with pytest.raises(
        InputError, match=r"logits is \[2, 3\] in the original, \[2, 4\] in the mod"
    ):
        behaviour(*other, torch.ones(1))
    with pytest.raises(InputError, match="the original cannot be run on these inputs: TypeError"):
        behaviour(Table(), Table(), {"lost": torch.ones(1)})


def test_nan_is_said_and_never_averaged() -> None:
    x = torch.randn(1, 3, V)
    y = x.clone()
    y[0, 1, 2] = torch.nan
    found = behaviour(Returns({"logits": x}), Returns({"logits": y}), torch.ones(1))
    (row,) = found.predictions
    assert (row.places, row.compared, row.kl_mean) == (3, 2, 0.0)
    assert found.notes == (
        "logits: NaN or infinity in 1 of 3 places of the model, which are left out",
    )
    assert "2 of 3" in str(found)
    y.fill_(torch.nan)
    found = behaviour(Returns({"logits": x}), Returns({"logits": y}), torch.ones(1))
    assert found.kl != found.kl  # NaN: nothing was compared
    assert found.to_dict()["predictions"][0]["kl_mean"] is None
    assert "3 of 3 places of the model" in str(found)


def test_a_token_that_is_ruled_out_is_a_number_and_infinite_divergence_is_said() -> None:
    x = torch.randn(1, 2, V)
    x[..., 0] = -torch.inf
    assert behaviour(Returns({"logits": x}), Returns({"logits": x}), torch.ones(1)).kl == 0.0
    y = x.clone()
    y[0, 0, 1] = -torch.inf
    found = behaviour(Returns({"logits": x}), Returns({"logits": y}), torch.ones(1))
    assert found.predictions[0].kl_max == torch.inf
    assert any("KL is infinite" in note for note in found.notes)
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_nan_of_a_probe_is_said() -> None:
    x = Returns({"logits": torch.ones(1, 2)})
    found = behaviour(x, copy.deepcopy(x), torch.ones(1), {"p": lambda out: float("nan")})
    assert "probe p: NaN or infinity in the original" in found.notes
    assert found.to_dict()["probes"][0]["original"] is None


def test_one_prediction_everywhere_is_worth_a_note() -> None:
    x = Returns({"logits": torch.tensor([1.0, 2.0]).expand(3, 4, 2)})
    note = "logits is the same at every place of the original: it shows little"
    assert note in behaviour(x, copy.deepcopy(x), torch.ones(1)).notes


def test_nothing_of_the_models_and_inputs_changes() -> None:
    class Writes(Table):
        def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None
        ) -> dict[str, Tensor]:
            found = super().forward(input_ids.add_(0), attention_mask)
            input_ids.fill_(0)
            return found

    original, model, inputs = Writes(), Table(shift=1.0).train(), tokens()
    state = torch.get_rng_state()
    found = behaviour(original, model, inputs)
    assert found.kl == 0.0
    assert torch.equal(inputs["input_ids"], tokens()["input_ids"])
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_an_original_that_is_compiled_in_place_is_beside_its_plain_self() -> None:
    model = Table()
    model._compiled_call_impl = lambda **k: {n: -x for n, x in model.forward(**k).items()}
    found = behaviour(model, model, tokens())
    assert found.kl > 0
    assert found.notes == ()


def test_the_table_is_compact() -> None:
    found = behaviour(Table(), Table(), tokens(), {"mean": lambda out: float(out["logits"].mean())})
    text = str(found)
    assert len(text.splitlines()) <= 14
    for word in ("KL mean, nats", "top-1", "100.0%", "last_hidden_state", "1.000000", "mean"):
        assert word in text
