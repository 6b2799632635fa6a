"""SIGTERM and Ctrl-C: training ends after the step that it is in, with a checkpoint."""

import signal

import jax
from absl import logging
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """A signal's name: training shall end after this step."""


EXIT_CODES = {"SIGTERM": 143, "SIGINT": 130}  # as a shell has them


class Interrupt:
    """Within it, the first SIGTERM or Ctrl-C is only noted; a second one kills as usual.

    In a run of several processes JAX notes SIGTERM, sent to any of them, and has all stop after the same step.
    """

    def __init__(self):
        self._name: str | None = None
        self._calls = 0

    def requested(self, step: int) -> str | None:
        """The name of the signal on account of which to stop after this step; EXIT_CODES has the code to end with.

        All processes call it equally often.
        """
        if jax.process_count() > 1:
            self._calls += 1  # JAX counts steps, of which a validation is many
            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(self._calls) else None
        return self._name

    def __enter__(self):
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._previous = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def __exit__(self, *error):
        self._restore()

    def _request(self, number, frame):
        self._name = signal.Signals(number).name
        logging.info("%s: saving a checkpoint after this step.", self._name)
        self._restore()

    def _restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
