"""From requests to scale-ups: what the ledger and KEDA make of a trace, whatever the policy.

A model that nobody asks is at zero. Its first request asks for a replica; KEDA takes it away once no request has been there for longer than
the cooldown (scaler/books/hpa.py, `activation`). The time in between is an episode. How soon a node serves moves the end of an episode by
seconds, and is left out, so all policies are given the same episodes. One replica a model: how many a busy model has is not a question of
what stands ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scaler.simulate.trace import Floats, Ints, Trace


@dataclass(frozen=True)
class Episodes:
    """By `begin`, rising. model: an index. quiet: when its last request has ended. end: when its replica goes. next: when the same model
    begins again; infinite: not any more. All in seconds from the trace's start.
    """

    model: Ints
    begin: Floats
    quiet: Floats
    end: Floats
    next: Floats


def episodes(trace: Trace, cooldown_seconds: float, request_seconds: float, tokens_a_second: float) -> Episodes:
    """request_seconds: what each request takes whatever its tokens are; tokens_a_second: of one request's own answer."""
    order = np.lexsort((trace.at, trace.model))
    model, at = trace.model[order], trace.at[order]
    done = at + request_seconds + trace.tokens[order] / tokens_a_second
    first = np.ones(len(at), dtype=bool)
    first[1:] = model[1:] != model[:-1]
    # The latest end of all requests so far of the same model: models are set apart, so that one running maximum does for all.
    apart = model * (2 * trace.seconds + float(done.max()))
    latest = np.maximum.accumulate(done + apart) - apart
    begins = first.copy()
    begins[1:] |= at[1:] - latest[:-1] > cooldown_seconds
    start = np.flatnonzero(begins)
    last = np.append(start[1:], len(at)) - 1
    quiet = latest[last]
    following = np.full(len(start), np.inf)
    same = model[start[1:]] == model[start[:-1]]
    following[:-1][same] = at[start[1:]][same]
    rising = np.argsort(at[start], kind="stable")
    quiet = quiet[rising]
    return Episodes(model[start][rising], at[start][rising], quiet, quiet + cooldown_seconds, following[rising])
