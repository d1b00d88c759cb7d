"""Protobuf messages in private descriptor pools.

Users import raymesh beside tritonclient, kserve or another etcd client, which register messages with our very names in
protobuf's default pool; a second registration there is fatal. So every ``.proto`` of ours is compiled to a descriptor
set (``.binpb``, no generated Python, hence no coupling to a protobuf release) and loaded into a pool of its own.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory


class Messages:
    """The message classes of one descriptor set, as attributes: ``Messages("raymesh.registry", "etcd").PutRequest``.

    Nested messages are reached through their parent class. `pool` is the private pool (for server reflection).
    """

    def __init__(self, package: str, name: str) -> None:
        data = resources.files(package).joinpath("proto", f"{name}.binpb").read_bytes()
        self.pool = descriptor_pool.DescriptorPool()
        self.files: list[str] = []
        for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:
            self.pool.Add(file)
            self.files.append(file.name)
        for file_name in self.files:
            for message in self.pool.FindFileByName(file_name).message_types_by_name.values():
                setattr(self, message.name, message_factory.GetMessageClass(message))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no message {name!r} in {self.files}")
