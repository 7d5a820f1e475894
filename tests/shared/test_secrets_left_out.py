"""Secrets are taken out of whatever they stand in, and what says where a fault is stays."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from zerowake_shared.secrets_left_out import LEFT_OUT, Scrubber

S = "Xq7-planted.Secret_42"

TEXTS = [
    f"GET /v1/models Authorization: Bearer {S}",
    f"authorization: Basic {S}",
    f'{{"headers": {{"Authorization": "Digest username={S}, nonce=1"}}}}',
    f"curl -H 'X-Api-Key: {S}' http://here",
    f"Cookie: a=b; session={S}",
    f"pulling https://user:{S}@registry.example/v2/",
    f"redis://:{S}@redis.models:6379/0",
    f"https://bucket.s3.amazonaws.com/key?X-Amz-Signature={S}&X-Amz-Expires=60",
    f"POST /demand?token={S}",
    f"AWS_SECRET_ACCESS_KEY={S}",
    f"export HF_TOKEN='{S}'",
    f"password: {S}",
    f'  "db_password": "{S}",',
    f'said "{{\\"api_key\\": \\"{S}\\"}}"',
    f"vllm serve m --api-key {S} --port 8000",
    f"vllm serve m --api-key={S}",
    f'{{"time": "now", "message": "started", "token": "{S}"}}',
    f'{{"message": "env", "env": {{"ANYTHING": "{S}"}}}}',
    "key is hf_abcdefghijklmnopqrstuvwxyz",
    "uses sk-proj-abcdefghijklmnopqrstuv",
    "id AKIAIOSFODNN7EXAMPLE here",
    "jwt eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA\n-----END PRIVATE KEY-----",
]
SECRET_PARTS = (S, "hf_abc", "sk-proj", "AKIA", "eyJ", "MC4CAQ")


@pytest.mark.parametrize("text", TEXTS)
def test_what_looks_like_a_secret_goes(text: str) -> None:
    shown = Scrubber().text(text)
    assert LEFT_OUT in shown
    assert [part for part in SECRET_PARTS if part in shown] == []


@pytest.mark.parametrize(
    "text",
    [
        "activation 5a: held 3.1 ms, restored 120 ms, 512 max_tokens=100 prompt_tokens: 7",
        "tokenizer: /models/chat/tokenizer.json",
        '{"time": "2026-11-28T08:00:00", "level": "info", "message": "snapshot default/chat@0123456789ab", "tokens": 5}',
        "no Secret models/credentials: make it, or correct secretName: credentials",
        "push: {token_file: /etc/zerowake/token}",
        'zerowake_keda_streams_open{rpc="StreamIsActive"} 2.0',
        "s3://bucket/prefix and file:///stores/models",
        "a basic restoration of a digest 0123456789abcdef",
    ],
)
def test_what_is_none_stays(text: str) -> None:
    assert Scrubber().text(text) == text


def test_values_of_environments_go_and_their_names_stay() -> None:
    scrubber = Scrubber()
    shown = scrubber.value(
        {
            "models": {
                "chat": {"env": {"HF_TOKEN": S, "MODE": "fast", "PATH": "/usr/bin"}, "command": ["serve", "--api-key", S, "--port", "1"]}
            },
            "containers": [{"env": [{"name": "KEY", "value": S}, {"name": "B", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}],
            "args": [f"--auth-token={S}", "--model", "chat"],
            "metadata": {"annotations": {"kubectl.kubernetes.io/last-applied-configuration": json.dumps({"env": S})}, "managedFields": [1]},
            "password": 123456,
            "secret": True,
            "push": {"token_file": "/etc/token"},
        }
    )
    assert shown == {
        "models": {
            "chat": {
                "env": {"HF_TOKEN": LEFT_OUT, "MODE": LEFT_OUT, "PATH": "/usr/bin"},
                "command": ["serve", "--api-key", LEFT_OUT, "--port", "1"],
            }
        },
        "containers": [
            {"env": [{"name": "KEY", "value": LEFT_OUT}, {"name": "B", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}
        ],
        "args": [f"--auth-token={LEFT_OUT}", "--model", "chat"],
        "metadata": {"annotations": {}},
        "password": LEFT_OUT,
        "secret": True,
        "push": {"token_file": "/etc/token"},
    }


@pytest.mark.parametrize(
    "met", [{"env": {"ANY": S}}, {"password": S}, {"command": ["m", "--hf-token", S]}, {"environment": [{"name": "a", "value": S}]}]
)
def test_what_was_met_as_a_secret_goes_from_everywhere(met: Any) -> None:
    scrubber = Scrubber()
    scrubber.value(met)
    assert scrubber.text(f"the engine said {S} aloud") == f"the engine said {LEFT_OUT} aloud"


def test_variables_of_this_process_and_keys_are_known() -> None:
    scrubber = Scrubber({"AWS_SECRET_ACCESS_KEY": S, "SHELL": "/bin/bash-of-mine"})
    scrubber.know("-----BEGIN X-----\nline-one-of-it\n")
    shown = scrubber.text(f"{S} /bin/bash-of-mine line-one-of-it")
    assert shown == f"{LEFT_OUT} /bin/bash-of-mine {LEFT_OUT}"


def test_a_value_that_is_a_common_word_does_not_go_from_all_texts() -> None:
    scrubber = Scrubber()
    scrubber.value({"env": {"LEVEL": "warning", "N": "100000"}})
    assert scrubber.text("warning: 100000 requests") == "warning: 100000 requests"


def test_a_secret_that_json_writes_otherwise_goes_too() -> None:
    scrubber = Scrubber()
    scrubber.know('a"quoted\\secret')
    assert LEFT_OUT in scrubber.known_out(json.dumps({"said": 'a"quoted\\secret'}))


def test_a_long_line_takes_no_time_to_speak_of() -> None:
    begin = time.process_time()
    Scrubber().text("a" * 2_000_000)
    assert time.process_time() - begin < 30  # it would be hours, were any form of a square
