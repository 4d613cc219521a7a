"""From a request on its way to a replica to what the router must know of it."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from tokenflow.cluster.api.protocol import Call
from tokenflow.cluster.locality import prefix_keys
from tokenflow.cluster.replica_registry import REGISTRY, ReplicaRegistry
from tokenflow.cluster.routing import Ask, counted_rate
from tokenflow.cluster.wire import Submission
from tokenflow.replicas.sampling.params import SamplingParams


def ask_of(submission: Submission) -> Ask:
    """What the choice depends on. A resubmitted stream has its tokens so far computed as well."""
    known = len(submission.prompt_ids) + len(submission.resumed_ids)
    source = submission.kv_source or ""
    return Ask(
        prompt_tokens=known,
        output_tokens=max(1, submission.params.max_tokens - len(submission.resumed_ids)),
        rate=counted_rate(submission.token_rate),
        kv_node=source,
        kv_tokens=known if source else 0,
    )


def asks_of(call: Call, prompts: Seq[Seq[int]], params: Seq[SamplingParams]) -> list[Ask]:
    """One for each stream of a call; `params` has those of each, prompt by prompt."""
    rate = counted_rate(call.token_rate)
    return [Ask(len(prompts[i // call.n]), each.max_tokens, rate) for i, each in enumerate(params)]


def place(
    submission: Submission, candidates: Iterable[str], registry: ReplicaRegistry = REGISTRY
) -> list[str]:
    """Rank the candidates for it; it is counted on the first one from now on."""
    keys = prefix_keys(submission.prompt_ids, submission.cache_salt)
    return registry.assign(submission.request_id, ask_of(submission), candidates, keys)
