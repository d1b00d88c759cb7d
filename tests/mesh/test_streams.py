"""The streaming methods of the gateway's gRPC listener: inference, health, reflection."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2

from raymesh.registry.protos import Messages

OIP = Messages("raymesh.runtimes", "oip")
HEALTH = Messages("raymesh.mesh", "health")
METADATA = (("x-raymesh-token", "secret"),)


def stream(mesh: Any, timeout_s: float = 10.0) -> Any:
    rpc = mesh.channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        request_serializer=OIP.ModelInferRequest.SerializeToString,
        response_deserializer=OIP.ModelStreamInferResponse.FromString,
    )
    return rpc(metadata=METADATA, timeout=timeout_s)


@pytest.mark.parametrize("is_cold", [True, False])
def test_each_request_of_a_stream_is_answered_in_turn(shell_mesh, is_cold):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m", loadNow=not is_cold, sync=True)
            call = stream(mesh)
            names = ["m", "nobody", "m", "m"] * 20

            async def write() -> None:
                for name in names:
                    await call.write(OIP.ModelInferRequest(model_name=name, id="7"))
                await call.done_writing()

            writing = asyncio.create_task(write())
            answers = [answer async for answer in call]
            await writing
            for name, answer in zip(names, answers, strict=True):
                if name == "m":
                    assert (answer.error_message, answer.infer_response.id) == ("", "r0")
                else:
                    assert answer.error_message == "Request for unknown model: 'nobody' is not found"
                    assert (answer.infer_response.id, answer.infer_response.model_name) == ("7", "nobody")
            assert mesh.loads == ["default/m"]

    asyncio.run(body())


def test_a_stream_says_which_answer_is_the_last(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            call = stream(mesh)
            for name in ("m", "nobody"):
                request = OIP.ModelInferRequest(model_name=name)
                request.parameters["triton_enable_empty_final_response"].bool_param = True
                await call.write(request)
                answer = await call.read()
                assert answer.infer_response.parameters["triton_final_response"].bool_param
            await call.write(OIP.ModelInferRequest(model_name="m"))
            assert not (await call.read()).infer_response.parameters
            await call.done_writing()

    asyncio.run(body())


def test_a_stream_survives_the_eviction_of_its_model(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=2) as mesh:
            await mesh.register("m")
            call = stream(mesh)
            for _ in range(3):
                await call.write(OIP.ModelInferRequest(model_name="m"))
                assert not (await call.read()).error_message
                for runtime in mesh.runtimes:
                    runtime.evict("default/m")
            await call.done_writing()

    asyncio.run(body())


def test_who_leaves_a_stream_leaves_nothing_behind(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            mesh.runtimes[0].gate = asyncio.Event()
            await mesh.register("m")
            before = len(asyncio.all_tasks())
            call = stream(mesh)
            for _ in range(3):
                await call.write(OIP.ModelInferRequest(model_name="m"))
            await poll(lambda: mesh.loads)
            call.cancel()
            mesh.runtimes[0].gate.set()
            await poll(lambda: len(asyncio.all_tasks()) <= before)

    asyncio.run(body())


def test_what_is_no_request_is_an_answer_too(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            rpc = mesh.channel.stream_stream(
                "/inference.GRPCInferenceService/ModelStreamInfer",
                response_deserializer=OIP.ModelStreamInferResponse.FromString,
            )
            call = rpc(metadata=METADATA, timeout=10)
            await call.write(b"\xff\xff")
            assert "ModelInferRequest" in (await call.read()).error_message
            await call.write(b"")
            assert "names no model" in (await call.read()).error_message
            await call.done_writing()

    asyncio.run(body())


def test_health(shell_mesh, poll):
    async def body():
        async with shell_mesh(runtimes=1) as mesh:

            async def check(service: str) -> int:
                request = HEALTH.HealthCheckRequest(service=service)
                return (await mesh.call("/grpc.health.v1.Health/Check", request, HEALTH.HealthCheckResponse)).status

            assert [await check(service) for service in ("", "mmesh.ModelMesh")] == [1, 1]
            assert (await mesh.code_of(check("nothing")))[0] is grpc.StatusCode.NOT_FOUND
            rpc = mesh.channel.unary_stream(
                "/grpc.health.v1.Health/Watch",
                request_serializer=HEALTH.HealthCheckRequest.SerializeToString,
                response_deserializer=HEALTH.HealthCheckResponse.FromString,
            )
            watching = rpc(HEALTH.HealthCheckRequest(), metadata=METADATA, timeout=20)
            unknown = rpc(HEALTH.HealthCheckRequest(service="nothing"), metadata=METADATA, timeout=20)
            assert (await watching.read()).status == 1
            assert (await unknown.read()).status == 3
            (runtime,) = mesh.runtimes
            runtime.draining = True
            await runtime.publish()
            assert (await watching.read()).status == 2
            assert await check("") == 2
            runtime.draining = False
            await runtime.publish()
            assert (await watching.read()).status == 1
            watching.cancel()
            unknown.cancel()

    asyncio.run(body())


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection(shell_mesh, version):
    messages = Messages("raymesh.mesh", "reflection" if version == "v1" else "reflection_v1alpha")

    async def body():
        async with shell_mesh() as mesh:
            rpc = mesh.channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                request_serializer=messages.ServerReflectionRequest.SerializeToString,
                response_deserializer=messages.ServerReflectionResponse.FromString,
            )
            call = rpc(metadata=METADATA, timeout=10)

            async def ask(**fields: Any) -> Any:
                await call.write(messages.ServerReflectionRequest(**fields))
                answer = await call.read()
                assert answer.original_request == messages.ServerReflectionRequest(**fields)
                return answer

            listed = {s.name for s in (await ask(list_services="*")).list_services_response.service}
            assert listed == {
                "inference.GRPCInferenceService",
                "mmesh.ModelMesh",
                "raymesh.v1.Mesh",
                "grpc.health.v1.Health",
                "grpc.reflection.v1.ServerReflection",
                "grpc.reflection.v1alpha.ServerReflection",
            }
            for fields in (
                {"file_containing_symbol": "inference.GRPCInferenceService.ModelInfer"},
                {"file_containing_symbol": "inference.ModelInferRequest"},
                {"file_by_filename": "oip.proto"},
            ):
                (data,) = (await ask(**fields)).file_descriptor_response.file_descriptor_proto
                assert descriptor_pb2.FileDescriptorProto.FromString(data).package == "inference"
            numbers = await ask(all_extension_numbers_of_type="inference.ModelInferRequest")
            assert not numbers.all_extension_numbers_response.extension_number
            for fields in (
                {"file_by_filename": "nothing.proto"},
                {"file_containing_symbol": "no.Such"},
                {"all_extension_numbers_of_type": "no.Such"},
                {"file_containing_extension": {"containing_type": "no.Such", "extension_number": 1}},
            ):
                assert (await ask(**fields)).error_response.error_code == 5
            assert (await ask()).error_response.error_code == 3
            await call.done_writing()

    asyncio.run(body())


@pytest.mark.parametrize("by_header", [True, False])
def test_a_stream_to_a_vmodel(shell_mesh, by_header):
    mmesh = Messages("raymesh.mesh", "mmesh")

    async def body():
        async with shell_mesh() as mesh:
            await mesh.register("m")
            request = mmesh.SetVModelRequest(vModelId="v", targetModelId="m")
            await mesh.call("/mmesh.ModelMesh/setVModel", request, mmesh.VModelStatusInfo)
            rpc = mesh.channel.stream_stream(
                "/inference.GRPCInferenceService/ModelStreamInfer",
                request_serializer=OIP.ModelInferRequest.SerializeToString,
                response_deserializer=OIP.ModelStreamInferResponse.FromString,
            )
            call = rpc(metadata=(*METADATA, ("mm-vmodel-id-bin", b"v")) if by_header else METADATA, timeout=10)
            await call.write(OIP.ModelInferRequest(model_name="any" if by_header else "v"))
            answer = await call.read()
            assert (answer.error_message, answer.infer_response.id) == ("", "r0")
            assert mesh.runtimes[0].requests[-1][0] == "default/m"
            await call.done_writing()
            # The questions about a model are answered for a vmodel too.
            assert (await mesh.rest("/v2/models/v/config"))[1]["name"] == "v"
            assert (await mesh.rest("/v1/models/v")) == (200, {"name": "v", "ready": True})
            assert [m["name"] for m in (await mesh.rest("/v2/models/v/stats"))[1]["model_stats"]] == ["v"]

    asyncio.run(body())
