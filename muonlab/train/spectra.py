"""The callback that adds the spectra of weights and updates, and the anatomy of the largest logit, to a run's rows."""

from collections import defaultdict
from typing import Any

import lightning as L
import torch
from torch import Tensor

from muonlab.optim.sharded import whole
from muonlab.record.logit_peak import LogitPeak, logit_peak
from muonlab.record.spectra import group_spectra, singular_values, svd_entropy
from muonlab.train.module import LanguageModel
from muonlab.train.recording import Recording


class Spectra(L.Callback):
    """Every `every` steps, from step 0: columns of the row that `recording` closes, so it must stand before it.

    `<measure>/<group>` for every optimizer group that has matrices, with the measures of
    `muonlab.record.spectra.group_spectra`: of the weights before the step, and of the step's whole change, which is the
    update with weight decay and clip. `matrix_svd_entropy/<parameter>` is that of every matrix by itself (of a stack
    the mean), for claims that count matrices. Of the largest logit of the fixed probe batch over layers and heads,
    before the step: `probe_max_logit`, `argmax_query_norm`, `argmax_key_norm`, `argmax_cosine`, `query_rms` and
    `key_rms` (see
    `muonlab.record.logit_peak.LogitPeak`), and `argmax_layer` and `argmax_head`, since a jump may be another head's
    taking over. Draws no random number and leaves the model as it found it.
    """

    def __init__(self, recording: Recording, every: int):
        self.recording, self.every = recording, every
        self.weights_before: dict[str, Tensor] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the logits, and keep the weights to know the update."""
        assert isinstance(module, LanguageModel)
        if batch_idx % trainer.accumulate_grad_batches or trainer.global_step % self.every:
            return
        if self.recording.record is None and module.device_mesh is None:
            return  # of sharded weights every rank has a part to give
        self.recording.row |= probe_peak(module)
        self.weights_before = {
            name: whole(parameter).clone()
            for name, parameter in module.model.named_parameters()
            if parameter.ndim in (2, 3)
        }

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is done: decompose weights and change, group by group."""
        assert isinstance(module, LanguageModel)
        if not self.weights_before or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        group_of = {route.name: route.group for route in module.optimizer.routing}
        after = {n: whole(p) for n, p in module.model.named_parameters() if n in self.weights_before}
        if self.recording.record is None:
            self.weights_before = {}
            return
        weights: dict[str, list[Tensor]] = defaultdict(list)
        updates: dict[str, list[Tensor]] = defaultdict(list)
        for name, before in self.weights_before.items():
            weights[group_of[name]].append(before.double())
            updates[group_of[name]].append(after[name].double() - before.double())
            entropy = svd_entropy(singular_values(before)).mean()
            self.recording.row |= {f"matrix_svd_entropy/{name}": entropy}
        for group in weights:
            measures = group_spectra(weights[group], updates[group])
            self.recording.row |= {f"{measure}/{group}": value for measure, value in measures.items()}
        self.weights_before = {}


def probe_peak(module: LanguageModel) -> dict[str, Tensor]:
    """The largest logit that the model gives the fixed probe batch, and its parts, by column."""
    peaks: list[LogitPeak] = []

    with module.model.watch_attention(lambda queries, keys: peaks.append(logit_peak(queries, keys))):
        module.probe()
    layer = torch.stack([peak.max_logit for peak in peaks]).argmax()
    peak = LogitPeak(*(torch.stack(of_layers)[layer] for of_layers in zip(*peaks, strict=True)))
    return {
        "probe_max_logit": peak.max_logit,
        "argmax_query_norm": peak.query_norm,
        "argmax_key_norm": peak.key_norm,
        "argmax_cosine": peak.cosine,
        "argmax_layer": layer.double(),
        "argmax_head": peak.head,
        "query_rms": peak.query_rms,
        "key_rms": peak.key_rms,
    }
