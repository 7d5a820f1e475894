"""The members of a Service, as its EndpointSlices come and go."""

from scaler.kubernetes.endpoints import EndpointConditions, EndpointSlice, SliceEndpoint, of_service
from scaler.kubernetes.resources import Metadata


class _Slices:
    """What an informer offers."""

    def __init__(self) -> None:
        self.found: list[EndpointSlice] = []
        self.callback = lambda old, new: None

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.found)

    def on_change(self, callback) -> None:  # type: ignore[no-untyped-def]
        self.callback = callback


def test_addresses_of_a_service() -> None:
    slices = _Slices()
    addresses = of_service(slices, 9445)  # type: ignore[arg-type]
    seen: list[frozenset[str]] = []
    with addresses.told_to(seen.append):
        slices.found = [
            EndpointSlice(Metadata("a"), (SliceEndpoint(("10.0.0.1",)), SliceEndpoint(("10.0.0.2",)))),
            EndpointSlice(Metadata("b"), (SliceEndpoint(("fd00::1",)),)),
            EndpointSlice(Metadata("c"), None),
        ]
        slices.callback(None, slices.found[0])
        slices.callback(None, slices.found[0])
        slices.found = []
        slices.callback(None, None)
    slices.found = [EndpointSlice(Metadata("a"), (SliceEndpoint(("10.0.0.1",)),))]
    slices.callback(None, None)
    assert seen == [frozenset(), {"10.0.0.1:9445", "10.0.0.2:9445", "[fd00::1]:9445"}, frozenset()]


def test_members_that_do_not_serve_are_listed_and_said_so() -> None:
    slices = _Slices()
    addresses = of_service(slices, 9445)  # type: ignore[arg-type]
    told: list[frozenset[str]] = []
    with addresses.told_to(told.append):
        for serving in (True, False, None):
            slices.found = [EndpointSlice(Metadata("a"), (SliceEndpoint(("10.0.0.1",), EndpointConditions(serving)),))]
            slices.callback(None, slices.found[0])
            assert addresses.unserving == ({"10.0.0.1:9445"} if serving is False else frozenset())
    assert told == [frozenset(), *[{"10.0.0.1:9445"}] * 3]
