"""A form's field `model`, found as it passes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler.gateway.form import BadForm, FormReader

TYPE = 'multipart/form-data; boundary="a b"'


def part(name: str, value: bytes, more: str = "") -> bytes:
    return f'--a b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"


FILE = part("file", b"--a b is no boundary here \r\n--a \r\n", '; filename="x.wav"\r\nContent-Type: audio/wav')
END = b"--a b--\r\n"


@given(st.integers(1, 200))
def test_it_is_found_wherever_it_stands_and_however_it_comes(size: int) -> None:
    body = FILE + part("prompt", b"x") + part("model", "org/m é".encode()) + END
    reader = FormReader(TYPE)
    for start in range(0, len(body), size):
        if reader.feed(body[start : start + size]):
            break
    assert reader.model == "org/m é"


@pytest.mark.parametrize(
    "body",
    [
        END,
        FILE + END,
        part("models", b"m") + END,
        part("model", b"m", '; filename="m.bin"') + END,
    ],
)
def test_a_form_without_it(body: bytes) -> None:
    reader = FormReader(TYPE)
    assert reader.feed(body)
    assert reader.model is None


def test_a_field_as_large_as_a_file_is_no_name() -> None:
    reader = FormReader(TYPE)
    reader.feed(part("model", b"x" * 10**6)[:-2])
    reader.feed(b"x" * 10**6 + b"\r\n" + END)
    assert reader.model is not None
    assert len(reader.model) < 10_000


def test_what_is_no_form() -> None:
    with pytest.raises(BadForm, match="boundary"):
        FormReader("multipart/form-data")
    with pytest.raises(BadForm):
        FormReader(TYPE).feed(b'{"model": "m"}')
