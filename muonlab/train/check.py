"""Whether a run could begin: its parts are built, and let go."""

from muonlab.train.config import RunConfig


def check_run(config: RunConfig) -> None:
    """Raises MuonlabError for what a run of these settings would refuse before its first step: devices, batches, text,
    the model's and the optimizer's settings, and routes. Nothing is recorded."""
    from muonlab.data import make_data, open_corpus
    from muonlab.train.module import LanguageModel
    from muonlab.train.trainer import choose_accelerator, refuse_huge_batches

    refuse_huge_batches(config, choose_accelerator(config.trainer))
    data = make_data(config.data, config.paths.cache, open_corpus(config.data, config.paths.cache))
    data.check_context(config.model.context)
    LanguageModel(config, data)
