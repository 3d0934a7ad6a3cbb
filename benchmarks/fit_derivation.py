"""Refresh what is derived: the rule, the study's hosts, and the tables of docs/profiles.md.

Run after measuring::

    python benchmarks/fit_derivation.py           # says what it finds, changes nothing
    python benchmarks/fit_derivation.py --write   # and writes data/rule.json and the platforms

The rule is fitted to every measured profile that is shipped; the loads and KV transfers of the
study's hosts to its published totals (``mmrl.profiles.published``).
"""

import argparse
from pathlib import Path

from mmrl.files import write_json
from mmrl.profiles import derive, registry
from mmrl.profiles.costs import CostModel
from mmrl.profiles.fit_rule import decode_errors, fit_rule, prefill_errors
from mmrl.profiles.published import (
    HOSTS,
    MODELS,
    PREEMPTIONS,
    RUN_TOKENS,
    fit_kv,
    fit_loads,
    held_out_errors,
)
from mmrl.profiles.schema import Platform, Profile, Transfer, save

PROMPT_TOKENS = 100


def measured_profiles() -> list[Profile]:
    """Return every measured profile that is shipped."""
    return [
        registry.get_profile(name, model)
        for name in registry.platforms()
        if registry.get_platform(name).kind == "measured"
        for model in registry.models(name)
    ]


def study_host(name: str) -> Platform:
    """Return the platform of a study's host with the transfers that the fits give it."""
    kv_save, kv_restore = (_rounded(t) for t in fit_kv()[name])
    return registry.get_platform(name).model_copy(
        update={
            "load": _rounded(fit_loads()[name]),
            "kv_save": kv_save,
            "kv_restore": kv_restore,
            "stream": kv_restore,
        }
    )


def _rounded(transfer: Transfer) -> Transfer:
    return Transfer(
        fixed_s=float(f"{transfer.fixed_s:.3g}"), bytes_per_s=float(f"{transfer.bytes_per_s:.3g}")
    )


def print_rule(profiles: list[Profile], rule: derive.Rule) -> None:
    """Print the constants and the errors on each profile."""
    for field, value in rule.model_dump().items():
        print(f"{field}: {value}")
    print("\n| model | decode, worst | prefill, worst |\n|---|---|---|")
    for profile in profiles:
        worst = [max(f(rule, profile), key=abs) for f in (decode_errors, prefill_errors)]
        print(f"| {profile.model} | {worst[0]:+.0%} | {worst[1]:+.0%} |")


def print_study() -> None:
    """Print the fits to the study's totals and how each pair of models predicts the third."""
    held_out = held_out_errors()
    print("\n| host | model | published | held-out error |\n|---|---|---|---|")
    for point in PREEMPTIONS:
        label = MODELS[point.model].label
        error = held_out[point.host, point.model]
        print(f"| {point.host} | {label} | {point.total_s:.2f} s | {error:+.1%} |")
    print("\ntokens/s over a run of 7,000 tokens\n")
    print("| host | model | study | ours |\n|---|---|---|---|")
    for point in PREEMPTIONS:
        platform = registry.get_platform(point.host)
        shape = MODELS[point.model].architecture
        costs = CostModel(derive.derive_profile(point.model, shape, platform))
        ours = RUN_TOKENS / float(costs.isolated_latency_s(PROMPT_TOKENS, RUN_TOKENS))
        published = point.decode_tokens_per_s
        print(
            f"| {point.host} | {point.model} | {published:.1f} | {ours:.1f} "
            f"({ours / published - 1:+.0%}) |"
        )


def main() -> None:
    """Fit, print and, if told, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write what was found")
    write = parser.parse_args().write
    profiles = measured_profiles()
    rule = fit_rule(profiles)
    if write:
        write_json(derive.RULE_FILE, rule.model_dump(mode="json"))
        derive.rule.cache_clear()
        for name in HOSTS:
            save(Path(registry.DATA) / name / registry.PLATFORM_FILE, study_host(name))
    print_rule(profiles, rule)
    for name in HOSTS:
        host = study_host(name)
        print(f"\n{name}: load {host.load}, KV out {host.kv_save}, in {host.kv_restore}")
    print_study()


if __name__ == "__main__":
    main()
