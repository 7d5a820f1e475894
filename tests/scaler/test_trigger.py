import pytest

from scaler.books.trigger import BadTrigger, Trigger, parse_trigger


@pytest.mark.parametrize(
    ("metadata", "trigger"),
    [
        ({"model": "chat"}, Trigger("chat", 8.0, None)),
        ({"model": "chat", "targetPending": "2.5", "maxStageSeconds": "0"}, Trigger("chat", 2.5, 0.0)),
        ({"modelFromEnv": "chat", "targetPendingFromEnv": "3"}, Trigger("chat", 3.0, None)),
        ({"model": "org/Chat-8B"}, Trigger("org/Chat-8B", 8.0, None)),
    ],
)
def test_own_keys(metadata: dict[str, str], trigger: Trigger) -> None:
    assert parse_trigger(metadata) == trigger


def test_what_keda_forwards_of_its_own_is_let_through() -> None:
    forwarded = [
        "scalerAddress",
        "enableTLS",
        "unsafeSsl",
        "caCert",
        "tlsClientCert",
        "tlsClientKey",
        "tlsCertFile",
        "metricName",
        "metricType",
    ]
    metadata = {"model": "chat"} | dict.fromkeys(forwarded, "x") | {"scalerAddressFromEnv": "y"}
    assert parse_trigger(metadata) == Trigger("chat")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, ["model is missing", "modelFromEnv"]),
        ({"model": "  "}, ["model is missing"]),
        ({"model": "chat", "targetpending": "3"}, ["'targetpending'", "did you mean targetPending?", "maxStageSeconds", "scalerAddress"]),
        ({"model": "chat", "threshold": "3"}, ["'threshold'", "allowed: model, targetPending, maxStageSeconds"]),
        ({"model": "chat", "thresholdFromEnv": "3"}, ["'thresholdFromEnv'"]),
        ({"model": "chat", "modelFromEnv": "chat"}, ["model and modelFromEnv"]),
        ({"model": "chat", "targetPending": "0"}, ["targetPending", "'0'", "0.001 or more"]),
        ({"model": "chat", "targetPending": "many"}, ["targetPending", "'many'"]),
        ({"model": "chat", "targetPending": "inf"}, ["targetPending", "'inf'"]),
        ({"model": "chat", "maxStageSeconds": "-1"}, ["maxStageSeconds", "'-1'", "0 or more"]),
        ({"model": "chat", "maxStageSeconds": "nan"}, ["maxStageSeconds", "'nan'"]),
    ],
)
def test_a_bad_key_is_named_with_what_is_allowed(metadata: dict[str, str], words: list[str]) -> None:
    with pytest.raises(BadTrigger) as refused:
        parse_trigger(metadata)
    for word in words:
        assert word in str(refused.value)
