"""A request's model is found as the rules say, or it is refused for the true reason."""

import pytest

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.gateway import routing
from scaler.gateway.asked import Asked
from scaler.gateway.refusal import Refusal
from scaler.gateway.target import read_target

LEDGER = Ledger({"m": ModelLimits(), "org/m": ModelLimits()})
LEDGER.declare("base", ModelLimits(), ["base-sql", "m"])


class Read:
    """A body that was read, or none."""

    def __init__(self, asked: Asked | None = None, fault: Refusal | None = None, empty: bool = False) -> None:
        self.asked, self.fault, self.empty = asked, fault, empty


def route(target: str, header: str | None = None, read: Read | None = None, method: str = "POST") -> str:
    headers = {"X-Zerowake-Model": header} if header is not None else {}
    upload = read or Read(empty=True)
    return routing.route(method, headers, read_target(target, LEDGER.knows), upload, LEDGER).model  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "header", "body", "model"),
    [
        ("/x", "org/m", "m", "m"),
        ("/models/org%2Fm/x", "", "unknown", "org/m"),
        ("/x", "m", "", "m"),
        ("/models/m/x", "unknown", "", "m"),
        ("/v1/realtime?model=org%2Fm&x=1", None, "", "org/m"),
        ("/v1/realtime?model=m", "org/m", "", "org/m"),
        ("/x", None, "base-sql", "base"),
        ("/x", "base", "an adapter that was loaded later", "base"),
        ("/models/base-sql/x", None, "", "base-sql"),
        ("/x", None, "m", "m"),  # a model's own name is nobody else's
    ],
)
def test_the_first_known_model_is_chosen(target: str, header: str | None, body: str, model: str) -> None:
    assert route(target, header, Read(Asked(body))) == LEDGER.named(model) == LEDGER.named(route(target, header, Read(Asked(body))))


@pytest.mark.parametrize(
    ("target", "read", "status", "code", "message"),
    [
        ("/x", Read(empty=True), 400, "model_missing", "this DELETE has no body that could"),
        ("/x", Read(), 400, "model_missing", "neither JSON nor a form"),
        ("/x", Read(Asked(kind="null")), 400, "model_missing", "its body has no `model`"),
        ("/x", Read(Asked("")), 400, "model_missing", "X-Zerowake-Model"),
        ("/x", Read(Asked(kind="array")), 400, "bad_model", "must be a string, not array"),
        ("/x", Read(Asked("nope")), 404, "model_not_found", "/v1/models lists"),
        ("/x", Read(Asked(" m ")), 404, "model_not_found", "begins or ends with a space"),
        ("/x", Read(fault=Refusal(400, "bad_json", "broken at 7")), 400, "bad_json", "broken at 7"),
        ("/models/nope/x", Read(Asked("")), 404, "model_not_found", "'nope'"),
    ],
)
def test_it_is_refused_for_the_true_reason(target: str, read: Read, status: int, code: str, message: str) -> None:
    with pytest.raises(Refusal) as refused:
        route(target, None, read, "DELETE")
    assert (refused.value.status, refused.value.reason) == (status, code)
    assert message in str(refused.value)


def test_what_cannot_be_read_does_not_matter_where_the_model_is_named() -> None:
    assert route("/x", "m", Read(fault=Refusal(400, "bad_json", "broken at 7"))) == "m"
    assert route("/x", "m", Read(Asked(kind="number"))) == "m"
