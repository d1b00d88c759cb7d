"""The placement controller: one leader, one load for each model, and what it writes down."""

from __future__ import annotations

import asyncio

import pytest

from raymesh.mesh.controller import Controller
from raymesh.mesh.orphans import orphans
from raymesh.mesh.placements import PlaceRequest
from raymesh.registry.records import CopyRecord, CopyState, ModelRecord
from raymesh.registry.store import Delete, Put
from raymesh.runtimes.errors import Code, Reason, RequestError


async def put_model(mesh, model: str, **fields):
    record = ModelRecord(tenant="default", id=model, type="fake", path="file:///m", **fields)
    await mesh.store.txn([], [Put(mesh.keys.model("default", model), record.encode())])


async def place(mesh, model: str, controller: Controller | None = None, **fields):
    body = {"tenant": "default", "id": model, "cause_id": "c1", "timeout_s": 5.0, **fields}
    address = (controller or mesh.leader).address
    return await mesh.upstreams.call(address, "POST", "/control/place", body, timeout_s=8.0)


async def error_of(awaitable) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await awaitable
    return caught.value


async def read_model(mesh, model: str) -> ModelRecord:
    return ModelRecord.decode((await mesh.store.get(mesh.keys.model("default", model))).value)


def test_it_answers_as_soon_as_the_copy_is_loaded(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=2) as mesh:
            await put_model(mesh, "m")
            answer = await place(mesh, "m")
            holder = next(runtime for runtime in mesh.runtimes if runtime.copies)
            assert (answer["instance"], answer["address"]) == (holder.id, holder.address)
            assert answer["generation"] == holder.copies["default/m"]
            assert await place(mesh, "m") == answer
            assert len(mesh.loads) == 1

    asyncio.run(body())


def test_many_callers_one_load_even_if_the_first_leaves(shell_mesh, poll):
    async def body():
        async with shell_mesh(runtimes=2) as mesh:
            await put_model(mesh, "m")
            for runtime in mesh.runtimes:
                runtime.gate = asyncio.Event()
            first = asyncio.create_task(place(mesh, "m"))
            await poll(lambda: mesh.loads)
            others = [asyncio.create_task(place(mesh, "m")) for _ in range(20)]
            first.cancel()
            for runtime in mesh.runtimes:
                runtime.gate.set()
            answers = await asyncio.gather(*others)
            assert len({answer["instance"] for answer in answers}) == 1
            assert len(mesh.loads) == 1

    asyncio.run(body())


def test_excluded_and_stale(shell_mesh, poll):
    async def body():
        async with shell_mesh(runtimes=2) as mesh:
            await put_model(mesh, "m")
            first = (await place(mesh, "m"))["instance"]
            await poll(lambda: mesh.leader.view.loaded_on("default/m"))
            # It is said not to have it: it is asked to load it (again).
            assert (await place(mesh, "m", stale=[first]))["instance"] == first
            assert len(mesh.loads) == 2
            second = (await place(mesh, "m", exclude=[first]))["instance"]
            assert second != first
            error = await error_of(place(mesh, "m", exclude=["r0", "r1"]))
            assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.NO_INSTANCE)

    asyncio.run(body())


def test_a_copy_just_loaded_is_not_doubled_because_a_request_came_too_early(shell_mesh):
    async def body():
        async with shell_mesh(runtimes=4) as mesh:
            for n in range(10):
                await put_model(mesh, f"m{n}")
                first = (await place(mesh, f"m{n}"))["instance"]
                again = await asyncio.gather(*(place(mesh, f"m{n}", stale=[first]) for _ in range(3)))
                assert {answer["instance"] for answer in again} == {first}
            assert all(sum(f"default/m{n}" in r.copies for r in mesh.runtimes) == 1 for n in range(10))

    asyncio.run(body())


def test_what_it_learns_is_written_on_the_record(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            runtime = mesh.runtimes[0]
            await put_model(mesh, "m")
            runtime.broken["default/m"] = "not a booster"
            error = await error_of(place(mesh, "m"))
            assert (error.code, error.reason) == (Code.FAILED_PRECONDITION, Reason.LOAD_FAILED)
            (failure,) = (await read_model(mesh, "m")).failures
            assert (failure.instance, failure.message) == ("r0", "not a booster")
            assert failure.expires_ms - failure.at_ms == 900_000

    asyncio.run(body())


def test_a_failure_expires_and_a_good_load_clears_it(shell_mesh, poll):
    async def body():
        async with shell_mesh(failure_expiry_s=0.3) as mesh:
            runtime = mesh.runtimes[0]
            await put_model(mesh, "m")
            runtime.broken["default/m"] = "not a booster"
            assert (await error_of(place(mesh, "m"))).message == "not a booster"
            runtime.broken.clear()
            loop = asyncio.get_running_loop()
            end_s = loop.time() + 5
            while True:
                try:
                    await place(mesh, "m")
                    break
                except RequestError:
                    assert loop.time() < end_s
            await poll(lambda: not mesh.leader.view.models["default/m"].record.failures)
            await poll(lambda: mesh.leader.view.models["default/m"].record.size_bytes == 1000)

    asyncio.run(body())


@pytest.mark.parametrize(("measured", "recorded"), [(1050, 1000), (1200, 1200)])
def test_a_size_is_written_again_only_when_it_differs(shell_mesh, poll, measured, recorded):
    async def body():
        async with shell_mesh() as mesh:
            await put_model(mesh, "m", size_bytes=1000)
            mesh.runtimes[0].size_bytes = measured
            await place(mesh, "m")
            await poll(lambda: mesh.leader._placements._notes.is_idle)
            assert (await read_model(mesh, "m")).size_bytes == recorded

    asyncio.run(body())


def test_sizes_are_written_together_and_a_changed_record_alone_is_written_anew(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            models = [f"m{number}" for number in range(5)]
            for model in models:
                await put_model(mesh, model)
                await place(mesh, model)
            # Unregistered, and registered anew, before its size was written.
            await mesh.store.txn([], [Delete(mesh.keys.model("default", "m1"))])
            await put_model(mesh, "m1")
            await poll(lambda: mesh.leader._placements._notes.is_idle)
            sizes = [(await read_model(mesh, model)).size_bytes for model in models]
            assert sizes == [1000, 0, 1000, 1000, 1000]

    asyncio.run(body())


def test_sizes_share_a_transaction(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            models = [f"m{number}" for number in range(100)]
            for model in models:
                await put_model(mesh, model)
            view, notes = mesh.leader.view, mesh.leader._placements._notes
            await poll(lambda: len(view.models) == len(models))
            for entry in list(view.models.values()):
                notes.write_size_soon(entry, 1000)
            await poll(lambda: notes.is_idle)
            written = [await mesh.store.get(mesh.keys.model("default", model)) for model in models]
            assert {ModelRecord.decode(kv.value).size_bytes for kv in written} == {1000}
            assert len({kv.mod_revision for kv in written}) == 2

    asyncio.run(body())


def test_unknown_models_and_bad_questions(shell_mesh):
    async def body():
        async with shell_mesh() as mesh:
            error = await error_of(place(mesh, "m"))
            assert (error.code, error.reason) == (Code.NOT_FOUND, Reason.NOT_REGISTERED)
            for body in ({"id": "m"}, {"tenant": "..", "id": "m"}, [], {"tenant": "default", "id": 7}):
                call = mesh.upstreams.call(mesh.leader.address, "POST", "/control/place", body, timeout_s=5)
                assert (await error_of(call)).code is Code.INVALID_ARGUMENT

    asyncio.run(body())


def test_a_deadline_ends_the_question_not_the_load(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            await put_model(mesh, "m")
            runtime = mesh.runtimes[0]
            runtime.gate = asyncio.Event()
            assert (await error_of(place(mesh, "m", timeout_s=0.1))).code is Code.DEADLINE_EXCEEDED
            runtime.gate.set()
            await place(mesh, "m")
            assert len(mesh.loads) == 1

    asyncio.run(body())


def test_one_leads_and_the_other_takes_over(shell_mesh, poll):
    async def body():
        async with shell_mesh(controllers=2) as mesh:
            await put_model(mesh, "m")
            await poll(lambda: sum(c.is_leader for c in mesh.controllers) == 1)
            first = mesh.leader
            other = next(c for c in mesh.controllers if c is not first)
            error = await error_of(place(mesh, "m", other))
            assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.NOT_LEADER)
            await first.close()
            await poll(lambda: other.is_leader)
            await place(mesh, "m", other)

    asyncio.run(body())


def test_a_leader_that_lost_its_lease_leads_no_more_until_elected_again(shell_mesh, poll):
    async def body():
        async with shell_mesh(controllers=2) as mesh:
            await poll(lambda: sum(c.is_leader for c in mesh.controllers) == 1)
            first = mesh.leader
            other = next(c for c in mesh.controllers if c is not first)
            await mesh.store.revoke(first._session.epoch)
            await poll(lambda: other.is_leader)
            await poll(lambda: not first.is_leader)
            await poll(lambda: not first._session.is_fenced)
            assert [c.is_leader for c in (first, other)] == [False, True]

    asyncio.run(body())


def test_a_load_on_an_instance_that_loses_its_lease_is_not_waited_for(shell_mesh, poll):
    async def body():
        async with shell_mesh(runtimes=2) as mesh:
            await put_model(mesh, "m")
            for runtime in mesh.runtimes:
                runtime.gate = asyncio.Event()
            question = asyncio.create_task(place(mesh, "m"))
            await poll(lambda: mesh.loads)
            frozen = next(runtime for runtime in mesh.runtimes if runtime.loads)
            other = next(runtime for runtime in mesh.runtimes if runtime is not frozen)
            other.gate.set()
            # Its connections stay open, as those of a frozen machine do.
            await frozen.session.close()
            assert (await question)["instance"] == other.id
            frozen.gate.set()

    asyncio.run(body())


def test_a_defect_in_its_work_does_not_end_it(shell_mesh, poll, monkeypatch):
    async def body():
        monkeypatch.setattr("raymesh.mesh.controller.ORPHAN_GRACE_S", 0.05)
        monkeypatch.setattr("raymesh.registry.for_ever.PAUSE_S", 0.01)
        failures = []

        def stumbling(view, names):
            if not failures:
                failures.append(names)
                raise ZeroDivisionError
            return orphans(view, names)

        monkeypatch.setattr("raymesh.mesh.controller.orphans", stumbling)
        async with shell_mesh() as mesh:
            runtime = mesh.runtimes[0]
            await poll(lambda: mesh.leader.is_leader)
            record = CopyRecord(state=CopyState.LOADED, generation=1)
            await runtime.session.publish(mesh.keys.copy("default", "one", "r0"), record.encode())
            await poll(lambda: failures)
            await runtime.session.publish(mesh.keys.copy("default", "two", "r0"), record.encode())
            await poll(lambda: "default/two" in runtime.unloads)

    asyncio.run(body())


def test_what_it_wrote_is_forgotten_when_the_view_shows_it(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            notes = mesh.leader._placements._notes
            for number in range(3):
                await mesh.register(f"m{number}", loadNow=True, sync=True)
            await poll(lambda: all(e.record.size_bytes for e in mesh.leader.view.models.values()))
            await poll(lambda: not notes._written)

    asyncio.run(body())


def test_orphaned_copies_are_unloaded(shell_mesh, poll, monkeypatch):
    async def body():
        monkeypatch.setattr("raymesh.mesh.controller.ORPHAN_GRACE_S", 0.05)
        async with shell_mesh() as mesh:
            runtime = mesh.runtimes[0]
            # Left behind by an unregistration that could not reach the runtime.
            record = CopyRecord(state=CopyState.LOADED, generation=1)
            await runtime.session.publish(mesh.keys.copy("default", "gone", "r0"), record.encode())
            await poll(lambda: "default/gone" in runtime.unloads)
            await poll(lambda: not mesh.leader.view.copies_of("default/gone"))

    asyncio.run(body())


def test_placements_do_not_read_the_registry_for_models_in_the_view(shell_mesh, poll):
    async def body():
        async with shell_mesh() as mesh:
            await put_model(mesh, "m")
            await poll(lambda: "default/m" in mesh.leader.view.models)
            mesh.store.get = None
            placed = await mesh.leader._placements.place(PlaceRequest("default/m", "c1"))
            assert placed.instance == "r0"

    asyncio.run(body())
