"""The columns of spectra and of the largest logit's anatomy, every `trainer.spectra_every` steps from step 0.

They draw no random numbers and leave the model unchanged.
"""

from collections import defaultdict

import torch
from torch import Tensor

from muonlab.optim.ranks import whole
from muonlab.record.logit_peak import LogitPeak, logit_peak
from muonlab.record.spectra import group_spectra, singular_values, svd_entropy
from muonlab.train.module import LanguageModel
from muonlab.train.providers import Columns, Step, provider


@provider("logit peak", at="start", every=lambda trainer: trainer.spectra_every)
def peak(step: Step) -> Columns:
    """The columns of `probe_peak`, of the weights before the update."""
    return Columns({**probe_peak(step.module)}) if _takes_part(step) else Columns()


@provider("spectra", every=lambda trainer: trainer.spectra_every, compares_weights=True)
def spectra(step: Step) -> Columns:
    """`<measure>/<group>` for every optimizer group with matrices, and `matrix_svd_entropy/<parameter>`.

    The measures are those of `muonlab.record.spectra.group_spectra`: of the weights before the step, and of the step's
    whole change, which is the update with weight decay and clip. The entropy of every matrix (of a stack the mean) is
    for claims that count matrices.
    """
    if not _takes_part(step):
        return Columns()
    after = {n: whole(p) for n, p in step.module.model.named_parameters() if p.ndim in (2, 3)}
    before = {name: whole(step.weights_before[name]) for name in after}
    if not step.recorded:
        return Columns()
    group_of = {route.name: route.group for route in step.module.optimizer.routing}
    weights: dict[str, list[Tensor]] = defaultdict(list)
    updates: dict[str, list[Tensor]] = defaultdict(list)
    scalars: dict[str, Tensor | float] = {}
    for name, weight in before.items():
        weights[group_of[name]].append(weight.double())
        updates[group_of[name]].append(after[name].double() - weight.double())
        scalars[f"matrix_svd_entropy/{name}"] = svd_entropy(singular_values(weight)).mean()
    for group in weights:
        measures = group_spectra(weights[group], updates[group])
        scalars |= {f"{measure}/{group}": value for measure, value in measures.items()}
    return Columns(scalars)


def _takes_part(step: Step) -> bool:
    """The first rank alone measures whole weights; sharded ones need a part from every rank."""
    return step.recorded or step.module.device_mesh is not None


def probe_peak(module: LanguageModel) -> dict[str, Tensor]:
    """The largest logit that the model gives the fixed probe batch, over layers and heads, and its parts, by column.

    probe_max_logit, argmax_query_norm, argmax_key_norm, argmax_cosine, query_rms, key_rms: see
        `muonlab.record.logit_peak.LogitPeak`.
    argmax_layer, argmax_head: the layer and head that have it, since a jump may mean that another head took over.
    """
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
