"""`ModelStreamInfer`: many inferences over one gRPC stream, each as if it had been a call of its own.

Rule of the file: answers come in the order of their requests; several are under way at a time. An inference that fails
is an answer with an `error_message`, and the stream goes on.
"""

from __future__ import annotations

import asyncio
import base64
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from google.protobuf.message import DecodeError

from raymesh.mesh.cold_path import ColdPath
from raymesh.mesh.config import Settings
from raymesh.mesh.grpc_service import BothStreams
from raymesh.mesh.inference_target import OwnInference
from raymesh.registry.protos import Messages
from raymesh.runtimes import grpc_http1
from raymesh.runtimes.errors import RequestError

METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"

#: Inferences of one stream that may be under way; more wait with the client.
WINDOW = 32
#: Metadata that names the model, or the vmodel, of all requests of a stream.
_PASSED_ON = frozenset({"mm-model-id", "mm-model-id-bin", "mm-vmodel-id", "mm-vmodel-id-bin", "tas-model-id"})
#: A client that wants to be told which answer is the last of a request (there is one for each) asks by this parameter,
_FINAL_WANTED = "triton_enable_empty_final_response"
#: and hears it by this one.
_FINAL = "triton_final_response"


class StreamInfer:
    """Serves the streams of one gateway."""

    def __init__(self, settings: Settings, cold: ColdPath) -> None:
        self._settings = settings
        self._cold = cold
        self._messages = Messages("raymesh.runtimes", "oip")
        #: Added to a serialized answer; protobuf merges what comes one after the other.
        final = self._messages.ModelInferResponse()
        final.parameters[_FINAL].bool_param = True
        self._final = bytes(final.SerializeToString())

    def methods(self) -> dict[str, BothStreams]:
        """The method, for `grpc_service.Services`. Its messages are bytes: most are passed on as they came."""
        return {METHOD: BothStreams(self.stream)}

    async def stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Answer each request of the stream."""
        metadata = {
            name.encode(): base64.b64encode(value) if isinstance(value, bytes) else value.encode()
            for name, value in context.invocation_metadata() or ()
            if name in _PASSED_ON
        }
        # One list for both sides: what is under way, oldest first, and None at the end.
        answers: deque[asyncio.Task[bytes] | None] = deque()
        changed = asyncio.Event()
        window = asyncio.Semaphore(WINDOW)

        async def read() -> None:
            try:
                async for message in requests:
                    await window.acquire()
                    answers.append(asyncio.create_task(self._answer(message, metadata)))
                    changed.set()
            finally:
                answers.append(None)
                changed.set()

        reader = asyncio.create_task(read())
        try:
            while True:
                while not answers:
                    changed.clear()
                    await changed.wait()
                task = answers[0]
                if task is None:
                    break
                answer = await task
                answers.popleft()
                window.release()
                yield answer
            await reader
        finally:
            # The caller has left, or all is done.
            reader.cancel()
            left = [task for task in answers if task is not None]
            for task in left:
                task.cancel()
            await asyncio.gather(reader, *left, return_exceptions=True)

    async def _answer(self, message: bytes, metadata: dict[bytes, bytes]) -> bytes:
        """The serialized ``ModelStreamInferResponse`` to a serialized ``ModelInferRequest``."""
        m = self._messages
        request = m.ModelInferRequest()
        try:
            with suppress(DecodeError):
                request = m.ModelInferRequest.FromString(message)
            until_s = asyncio.get_running_loop().time() + self._settings.request_timeout_s
            asked = OwnInference(
                grpc_http1.INFER_TARGET,
                {b"content-type": grpc_http1.CONTENT_TYPE, **metadata},
                grpc_http1.frame(message),
            )
            answer = await self._cold.ask(asked, until_s=until_s)
            response = grpc_http1.read_answer(answer.head, answer.rest)
        except RequestError as error:
            failed = m.ModelStreamInferResponse(error_message=error.message or error.code.name)
            failed.infer_response.model_name = request.model_name
            failed.infer_response.id = request.id
            if _FINAL_WANTED in request.parameters:
                failed.infer_response.parameters[_FINAL].bool_param = True
            return bytes(failed.SerializeToString())
        if _FINAL_WANTED in request.parameters:
            response += self._final
        return b"\x12" + grpc_http1.varint(len(response)) + response  # field 2: infer_response
