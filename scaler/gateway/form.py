"""A multipart form, as it comes: its field `model` is found as soon as it has passed, wherever it stands.

OpenAI's clients send audio, images and files so. The parser is python-multipart's, Starlette's own; it keeps nothing of what it has seen,
so a form may be as large as it likes. Pure.
"""

from __future__ import annotations

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from scaler.books.model_name import LONGEST

FORM = "multipart/form-data"


class BadForm(ValueError):
    """The body is no multipart form; the message says why."""


class FormReader:
    """Reads a form for one field. content_type: the request's, which has the boundary. Raises: BadForm if there is none."""

    def __init__(self, content_type: str) -> None:
        _, parameters = parse_options_header(content_type)
        boundary = parameters.get(b"boundary", b"")
        if not boundary:
            raise BadForm("its Content-Type names no boundary")
        self.model: str | None = None
        self.ended = False
        self._header_name = bytearray()
        self._header = bytearray()
        self._reading = False  # the part that passes is the field
        self._value = bytearray()
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_part_data": self._data,
                    "on_part_end": self._part_end,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise BadForm(str(error)) from None

    def feed(self, data: bytes) -> bool:
        """Takes what has come; whether the field is found, or the form is at its end. Raises: BadForm."""
        if not self.ended and self.model is None:
            try:
                self._parser.write(data)
            except FormParserError as error:
                raise BadForm(str(error)) from None
        return self.ended or self.model is not None

    def _part(self) -> None:
        self._reading = False
        self._value.clear()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            _, parameters = parse_options_header(bytes(self._header))
            # A part with a file name is a file, whatever its field is called.
            self._reading = parameters.get(b"name") == b"model" and b"filename" not in parameters
        self._header_name.clear()
        self._header.clear()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._reading and len(self._value) <= 4 * LONGEST:  # what is longer is no name that is known
            self._value += data[start:end][: 4 * LONGEST + 1]

    def _part_end(self) -> None:
        if self._reading and self.model is None:
            self.model = self._value.decode("utf-8", "replace")
        self._reading = False

    def _end(self) -> None:
        self.ended = True
