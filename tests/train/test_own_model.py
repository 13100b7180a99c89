"""A model of the user's own that has the members of CausalModel and nothing else trains like any other."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from muonlab.errors import MuonlabError
from muonlab.layout import AttentionLayout, HeadRows, ParameterRole
from muonlab.models import ModelOutput
from muonlab.models.max_logits import LogitRange
from muonlab.models.registry import MODELS
from muonlab.record import load_run
from muonlab.settings.check import Count, build
from muonlab.train.run import train


class OneLayer(nn.Module):
    """Embedding, one layer of two-head attention, head."""

    def __init__(self, vocab_size, width):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.maps = nn.ModuleDict(
            {name: nn.Linear(width, width, bias=False) for name in ("query", "key", "value")}
        )
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.layers = nn.ModuleList([self.maps])
        self.look = None
        self.extremes = self.weights = None

    def forward(self, tokens, targets=None, measure_entropy=False):
        x = self.embedding(tokens)
        q, k, v = (self.maps[n](x).unflatten(-1, (2, -1)).transpose(1, 2) for n in ("query", "key", "value"))
        if self.look:
            self.look(q, k)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        if self.training:
            ends = (
                scores.detach().masked_fill(later, -torch.inf),
                scores.detach().masked_fill(later, torch.inf),
            )
            self.extremes = LogitRange(ends[0].amax((0, 2, 3))[None], ends[1].amin((0, 2, 3))[None])
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        if measure_entropy:
            self.weights = weights
        logits = self.head(x + (weights @ v).transpose(1, 2).flatten(2))
        if targets is None:
            return ModelOutput(logits)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return ModelOutput(logits, loss, loss)

    def parameter_roles(self):
        roles = {f"maps.{name}.weight": ParameterRole(name, 2) for name in self.maps}
        return roles | {"embedding.weight": ParameterRole("embedding"), "head.weight": ParameterRole("head")}

    def attention_layouts(self):
        rows = {
            name: (HeadRows(self.maps[name].weight, rows=self.maps[name].out_features // 2),)
            for name in self.maps
        }
        return [AttentionLayout("layer_00", 2, 2, rows["query"], rows["key"])]

    def logit_extremes(self):
        return self.extremes

    def bounded_logits(self, limit, absolute):
        return self.extremes, torch.ones(1, 2, dtype=torch.bool)

    def attention_entropy(self):
        return torch.special.entr(self.weights).sum(-1).mean((0, 2))[None]

    def one_hot_share(self):
        return (self.weights.amax(-1) > 0.95).float().mean((0, 2))[None]

    @contextmanager
    def watch_attention(self, look):
        self.look = look
        yield
        self.look = None

    def flops_per_token(self, length):
        return 6.0 * sum(p.numel() for p in self.parameters())


@pytest.fixture
def own(tiny, monkeypatch):
    """compose(*overrides) -> a tiny run of the model 'own'."""
    assert MODELS.names()  # those of the package are registered before the copy is made
    monkeypatch.setattr(MODELS, "_builders", dict(MODELS._builders))
    monkeypatch.setattr(MODELS, "_sections", dict(MODELS._sections))

    @MODELS.register("own")
    def one_layer(*, vocab_size: Count | None = None, context: Count = 16, width: Count = 8):
        return OneLayer(vocab_size, width)

    @MODELS.register("half")
    def half(*, vocab_size: Count | None = None, context: Count = 16):
        return nn.Embedding(vocab_size, 8)

    @MODELS.register("closed")
    def closed(*, context: Count = 16):
        return nn.Embedding(256, 8)

    def compose(name, *overrides):
        return replace(tiny(*overrides), model=build(MODELS.section(name), {}, "model"))

    return compose


def test_it_trains_is_clipped_and_is_recorded_in_full(own):
    outcome = train(own("own", "optimizer.tau=0.05", "trainer.spectra_every=4", "trainer.exact_every=2"))
    assert outcome.status == "finished"
    run = load_run(outcome.folder)
    assert run.steps["train_loss"].notna().all()
    assert run.steps["probe_max_logit"].notna().sum() == 3
    assert run.max_logits.groupby("step").size().eq(2).all()
    assert run.max_logits["value"].gt(0.05).any()
    assert run.max_logits["gamma"].lt(1).any()
    assert run.max_logits["entropy"].notna().sum() == 4 * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("half", "model 'half' cannot be trained: it lacks"),
        ("closed", "model 'closed' has no setting vocab_size"),
    ],
)
def test_one_that_lacks_something_is_refused_before_anything_is_recorded(own, tmp_path, name, message):
    config = own(name)
    with pytest.raises(MuonlabError, match=message):
        train(config)
    assert not list((tmp_path / "runs").glob("*/config.yaml"))
