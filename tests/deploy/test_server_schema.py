"""Whatever the OpenAPI document allows or forbids, the answer is one that it tells of."""

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.deploy.made_up_engine import MadeUpEngine, Server, make_engine, make_tokenizer, serving

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
ENDLESS = "/admin/events"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, MadeUpEngine]]:
    engine = make_engine(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    with serving(engine) as server:
        yield server, engine


def check(
    operation: Any, mode: GenerationMode, examples: int, session: requests.Session, seen: set[int]
) -> None:
    """Send made-up requests to an operation, and note the statuses of the answers."""

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def answers(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "alpha"  # goes further than a name that does not exist
        seen.add(case.call_and_validate(session=session, checks=CHECKS).status_code)

    answers()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_answers_are_as_documented(
    served: tuple[Server, MadeUpEngine], mode: GenerationMode
) -> None:
    server, engine = served
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: dict[str, set[int]] = {}
    with requests.Session() as session:
        for result in document.get_all_operations():
            operation = result.ok()
            if operation.path == ENDLESS:
                continue
            if mode is GenerationMode.NEGATIVE and not operation.body:
                continue  # nothing in it can be wrong
            seen = statuses.setdefault(operation.label, set())
            varies = operation.body or operation.path_parameters
            check(operation, mode, 25 if varies else 1, session, seen)
    generation = [statuses[f"POST /v1/{kind}completions"] for kind in ("chat/", "")]
    if mode is GenerationMode.POSITIVE:
        assert len(statuses) == 13
        assert all(200 in seen for seen in generation) and engine.seen
    else:
        assert all(seen and max(seen) < 500 and 200 not in seen for seen in generation)


@pytest.mark.parametrize("kind", ["chat/", ""])
def test_streams_are_as_documented(served: tuple[Server, MadeUpEngine], kind: str) -> None:
    document = schemathesis.openapi.from_url(f"{served[0].url}/openapi.json")
    operation = document[f"/v1/{kind}completions"]["POST"]
    prompt = {"messages": [{"role": "user", "content": "x"}]} if kind else {"prompt": "x"}
    body = {"model": "alpha", "stream": True, **prompt}
    case = operation.Case(body=body, media_type="application/json")
    answer = case.call_and_validate(checks=CHECKS)
    assert answer.status_code == 200
    assert answer.headers["content-type"][0].startswith("text/event-stream")
