"""Errors that cross the boundary of the package: each says what, where, found, expected and what to try."""


class StepjaxError(Exception):
    """Base of every error that is the input's fault; the command line prints it without a traceback and exits 1."""


class ConfigError(StepjaxError):
    """A configuration is contradictory, or asks for arithmetic that this model does not have."""


class CheckpointError(StepjaxError):
    """A checkpoint folder or one of its files is missing, damaged or of another shape."""


class TokenizerError(StepjaxError):
    """A tokenizer file is missing, damaged or lacks an entry that the model needs."""


class TemplateError(StepjaxError):
    """A chat template failed, or exceeded its limits."""


class RequestError(StepjaxError):
    """A request (prompt, messages, sampling parameters) is not acceptable."""


class ContextError(RequestError):
    """A prompt is longer than the context, or leaves no room to answer.

    Attributes:
      num_tokens: of the prompt.
      context: the most tokens of a prompt and its answer.
    """

    def __init__(self, message: str, *, num_tokens: int, context: int):
        super().__init__(message)
        self.num_tokens, self.context = num_tokens, context


class TrainingError(StepjaxError):
    """A training run cannot go on, or its result is not good enough to be released."""


class MeshError(StepjaxError):
    """A mesh does not fit the devices, or the model cannot be split over it."""


class ClusterError(StepjaxError):
    """Processes that should run one command together do not know or do not find each other."""
