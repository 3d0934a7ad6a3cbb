"""What the link between host and device does to a model's costs: streamed steps, another link."""

from mmrl.profiles.costs import CostModel
from mmrl.profiles.schema import Platform, Profile, TokenPoint, Transfer

PACED_BY_LINK = 0.5  # a transfer this share of the link's rate or faster is paced by the link


def step_s(costs: CostModel, resident_layers: float, batch: int, context_tokens: int) -> float:
    """Return the time of a decode step with ``resident_layers`` on the device.

    An iteration ends when both its compute and its bytes are done, so a step takes the longer of
    the decode step and the stream: ``max(decode, fixed + missing layers * seconds per layer)``.
    """
    missing = costs.profile.layers - resident_layers
    compute = costs.decode_s(batch, context_tokens)
    if missing == 0:
        return compute
    stream = costs.profile.stream.fixed_s + missing * costs.stream_layer_s(batch)
    return max(compute, stream)


def on_link(platform: Platform, profile: Profile, bytes_per_s: float) -> tuple[Platform, Profile]:
    """Return a platform and a profile on it with a link of another rate; fixed parts stay.

    A transfer that reaches half of the platform's link is paced by it and follows in proportion;
    a slower one is paced by something else (pageable memory, software) and is only ever limited.
    """
    link = platform.link_bytes_per_s
    ratio = bytes_per_s / link

    def moved(transfer: Transfer) -> Transfer:
        rate = transfer.bytes_per_s
        rate = rate * ratio if rate >= PACED_BY_LINK * link else min(rate, bytes_per_s)
        return transfer.model_copy(update={"bytes_per_s": rate})

    stream = moved(profile.stream)
    slower = profile.stream.bytes_per_s / stream.bytes_per_s
    changed = profile.model_copy(
        update={
            "load": moved(profile.load),
            "stream": stream,
            "streamed_layer_s": tuple(
                TokenPoint(tokens=p.tokens, time_s=p.time_s * slower)
                for p in profile.streamed_layer_s
            ),
            "kv_save": moved(profile.kv_save),
            "kv_restore": moved(profile.kv_restore),
        }
    )
    return platform.model_copy(update={"link_bytes_per_s": bytes_per_s}), changed
