"""Checks that a run can begin: its parts are built and dropped."""

from muonlab.plugins import plugin_fault
from muonlab.train.config import RunConfig


def check_run(config: RunConfig) -> None:
    """Raises MuonlabError for anything that a run with these settings would refuse before its first step: devices,
    batch sizes, text, model and optimizer settings, routing. Nothing is recorded."""
    from muonlab.data import make_data, open_corpus
    from muonlab.train.accelerator import choose_accelerator
    from muonlab.train.module import LanguageModel
    from muonlab.train.trainer import refuse_huge_batches

    refuse_huge_batches(config, choose_accelerator(config.trainer))
    data = make_data(config.data, config.paths.cache, open_corpus(config.data, config.paths.cache))
    data.check_context(config.model.context)
    try:
        LanguageModel(config, data)
    except Exception as error:
        if (fault := plugin_fault(error)) is not None:
            raise fault from error
        raise
