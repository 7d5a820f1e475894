"""KEDA's contract as a whole: the wire, a thousand objects, and either side restarted, with a client that follows KEDA's own behaviour."""

import asyncio
from itertools import pairwise
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from zerowake_proto import externalscaler_pb2 as pb

from tests.worlds.keda_client import Keda, Watched, ref
from tests.worlds.scaler_process import models, scaler_process

OBJECTS = 1000
BACKOFF = (0.2, 6.0)  # KEDA's 2 and 60 seconds, ten times as fast

# From KEDA's published contract (its documentation of external scalers, and the file it publishes with version 2.21), typed by hand.
METHODS = {
    "/externalscaler.ExternalScaler/IsActive": ("ScaledObjectRef", "IsActiveResponse", False),
    "/externalscaler.ExternalScaler/StreamIsActive": ("ScaledObjectRef", "IsActiveResponse", True),
    "/externalscaler.ExternalScaler/GetMetricSpec": ("ScaledObjectRef", "GetMetricSpecResponse", False),
    "/externalscaler.ExternalScaler/GetMetrics": ("GetMetricsRequest", "GetMetricsResponse", False),
    "/externalscaler.ExternalScaler/StreamMetricSpec": ("ScaledObjectRef", "GetMetricSpecResponse", True),
}
FIELDS = {
    "ScaledObjectRef": {1: ("name", "string"), 2: ("namespace", "string"), 3: ("scalerMetadata", "map<string, string>")},
    "IsActiveResponse": {1: ("result", "bool")},
    "GetMetricSpecResponse": {1: ("metricSpecs", "repeated MetricSpec")},
    "MetricSpec": {1: ("metricName", "string"), 2: ("targetSize", "int64"), 3: ("targetSizeFloat", "double")},
    "GetMetricsRequest": {1: ("scaledObjectRef", "ScaledObjectRef"), 2: ("metricName", "string")},
    "GetMetricsResponse": {1: ("metricValues", "repeated MetricValue")},
    "MetricValue": {1: ("metricName", "string"), 2: ("metricValue", "int64"), 3: ("metricValueFloat", "double")},
}
SCALARS = {
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_DOUBLE: "double",
}


def spelled(field: FieldDescriptor) -> str:
    """The field's type as a .proto file has it."""
    message = field.message_type
    if message is None:
        return SCALARS[field.type]
    if message.GetOptions().map_entry:
        return f"map<{spelled(message.fields_by_number[1])}, {spelled(message.fields_by_number[2])}>"
    return f"repeated {message.name}" if field.is_repeated else message.name


def test_the_wire_is_kedas() -> None:
    service = pb.DESCRIPTOR.services_by_name["ExternalScaler"]
    methods = {
        f"/{service.full_name}/{one.name}": (one.input_type.name, one.output_type.name, one.server_streaming) for one in service.methods
    }
    assert methods == METHODS
    assert not any(one.client_streaming for one in service.methods)
    messages = {
        name: {number: (field.name, spelled(field)) for number, field in message.fields_by_number.items()}
        for name, message in pb.DESCRIPTOR.message_types_by_name.items()
    }
    assert messages == FIELDS


def test_the_wire_is_kedas_byte_by_byte() -> None:
    """What KEDA 2.21 sends for an object, and what it reads, as bytes."""
    sent = bytes.fromhex("0a0463686174120764656661756c741a0d0a056d6f64656c120463686174")
    assert pb.ScaledObjectRef.FromString(sent) == pb.ScaledObjectRef(name="chat", namespace="default", scalerMetadata={"model": "chat"})
    assert pb.IsActiveResponse(result=True).SerializeToString().hex() == "0801"
    value = pb.GetMetricsResponse(metricValues=[pb.MetricValue(metricName="m", metricValueFloat=1.5)])
    assert value.SerializeToString().hex() == "0a0c0a016d19000000000000f83f"


async def each(watched: list[Watched]) -> None:
    """Every object gets its `true`."""
    async with asyncio.timeout(60):
        await asyncio.gather(*(one.trues.get() for one in watched))


async def settled(watched: list[Watched]) -> None:
    """All streams of all objects are open."""
    async with asyncio.timeout(60):
        await asyncio.gather(*(one.specs.get() for one in watched))


async def test_a_thousand_objects_on_one_channel(tmp_path: Path) -> None:
    names = models(OBJECTS)
    async with scaler_process("127.0.0.1:0", OBJECTS) as scaler, Keda(scaler.address, backoff=BACKOFF) as keda:
        watched = [keda.watch(ref(name)) for name in names]
        await settled(watched)
        assert all(one.trues.empty() for one in watched)

        async with asyncio.timeout(60):
            polled = await asyncio.gather(*(keda.poll(one.ref) for one in watched))
        assert polled == [(0.0, False)] * OBJECTS
        await scaler.do("hold", names[500:501])
        await watched[500].true()
        await scaler.do("all")
        await each(watched[:500] + watched[501:])
        async with asyncio.timeout(60):
            polled = await asyncio.gather(*(keda.poll(one.ref) for one in watched))
        assert polled == [(2.0, True) if number == 500 else (1.0, True) for number in range(OBJECTS)]

        ends = [asyncio.create_task(one.ends.get()) for one in watched]
        assert await scaler.stop() == 0
        assert set(await asyncio.gather(*ends)) == {None}


@pytest.mark.parametrize("clean", [True, False], ids=["SIGTERM", "SIGKILL"])
async def test_no_activation_is_lost_when_the_scaler_is_restarted_under_load(tmp_path: Path, clean: bool) -> None:
    count = 200
    names = models(count)
    address = f"unix:{tmp_path}/scaler.sock"
    async with Keda(address, backoff=BACKOFF) as keda:
        async with scaler_process(address, count) as first:
            watched = [keda.watch(ref(name)) for name in names]
            await settled(watched)
            polls = asyncio.gather(*(keda.poll(one.ref) for one in watched), return_exceptions=True)
            await first.do("hold", names[::2])
            await (first.stop() if clean else first.kill())
            await polls
        ends = [await one.ends.get() for one in watched]
        assert set(ends) == ({None} if clean else {grpc.StatusCode.UNAVAILABLE})
        for one in watched:
            while not one.trues.empty():
                one.trues.get_nowait()
        async with scaler_process(address, count) as second:
            await second.do("all")  # the clients ask again, some before KEDA is back and some after
            await each(watched)


async def test_a_restarted_keda_is_told_of_what_waits(tmp_path: Path) -> None:
    names = models(50)
    async with scaler_process("127.0.0.1:0", 50) as scaler:
        async with Keda(scaler.address) as keda:
            await settled([keda.watch(ref(name)) for name in names])
        await scaler.do("all")
        async with Keda(scaler.address) as keda:
            await each([keda.watch(ref(name)) for name in names])


async def test_the_client_backs_off_as_keda_does(tmp_path: Path) -> None:
    """The client itself: were it more eager than KEDA, the tests above would prove less than they say."""
    async with Keda(f"unix:{tmp_path}/nobody.sock", backoff=(0.1, 60.0)) as keda:
        watched = keda.watch(ref("model-0"), specs=False)
        async with asyncio.timeout(30):
            times = [await watched.opened.get() for _ in range(4)]
            assert await watched.ends.get() == grpc.StatusCode.UNAVAILABLE
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert all(gap >= floor for gap, floor in zip(gaps, (0.1, 0.2, 0.4), strict=True))
