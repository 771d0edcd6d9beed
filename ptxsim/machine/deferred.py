"""Asynchronous operations that have been issued: performed at once, or in the late mode when the scheduler says."""

from __future__ import annotations

from ..errors import SimError


class Deferred:
    """The pending operations of a wave, oldest first."""

    def __init__(self, wave):
        self.wave, self.pending = wave, []

    def add(self, warp, action):
        """Perform an operation of a warp now, or (late mode) some time."""
        if self.wave.late:
            self.later(self.located(action, self.wave.warp_text, warp))
        else:
            action()

    def later(self, action):
        """Perform an action when the scheduler says."""
        self.pending.append(action)

    def located(self, action, name, *who):
        """The action with the present PTX line as its own; ``name(*who)`` names the warp in errors."""
        wave, line = self.wave, self.wave.line

        def later():
            wave.line = line
            try:
                action()
            except SimError as error:
                raise error.located(line, wave.ptx_line(line), name(*who)) from None

        return later

    def run_one(self, which=None):
        """Perform one pending operation (newest first, or random with a seed); False when there is none."""
        if not self.pending:
            return False
        if which is None:
            which = self.wave.rng.randrange(len(self.pending)) if self.wave.rng else -1
        self.pending.pop(which)()
        self.wave.active()
        return True
