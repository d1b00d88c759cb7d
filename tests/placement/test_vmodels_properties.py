"""Whatever is asked of vmodels in whatever order, the models' reference counts are true and nothing dangles."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from raymesh.placement.vmodels import (
    Flip,
    Plan,
    SetVModel,
    models_of,
    next_step,
    plan_delete,
    plan_failure,
    plan_flip,
    plan_set,
)
from raymesh.registry.records import ModelRecord, VModelRecord

vmodel_ids = st.sampled_from(["v", "w"])
model_ids = st.sampled_from(["a", "b", "c", "d"])
owners = st.sampled_from(["", "me", "you"])
loaded_sets = st.frozensets(model_ids)


class VModels(RuleBasedStateMachine):
    """A registry in which every plan is one transaction."""

    def __init__(self) -> None:
        super().__init__()
        self.vmodels: dict[str, VModelRecord] = {}
        self.models: dict[str, ModelRecord] = {}

    def write(self, vmodel_id: str, plan: Plan | None) -> None:
        if plan is None:
            return
        before = self.vmodels.pop(vmodel_id, None)
        if plan.vmodel is not None:
            self.vmodels[vmodel_id] = plan.vmodel
        for model, record in plan.models.items():
            self.models.pop(model, None)
            if record is not None:
                self.models[model] = record
        # What answered before answers now, unless it has been replaced.
        if before is not None and plan.vmodel is not None:
            assert plan.vmodel.active in {before.active, plan.vmodel.target}

    @rule(model=model_ids)
    def register(self, model: str) -> None:
        self.models.setdefault(model, ModelRecord(tenant="t", id=model, type="x", path=model))

    @rule(model=model_ids)
    def unregister(self, model: str) -> None:
        if model in self.models and self.models[model].refs == 0:
            del self.models[model]

    @rule(
        vmodel=vmodel_ids,
        new_target=model_ids,
        owner=owners,
        flags=st.tuples(*[st.booleans()] * 5),
        expected=st.sampled_from(["", "a", "b"]),
        loaded=loaded_sets,
    )
    def set(self, vmodel, new_target, owner, flags, expected, loaded) -> None:
        target = new_target
        creates, auto_deletes, updates_only, is_forced, loads_now = flags
        created = ModelRecord(tenant="t", id=target, type="x", path=target, auto_delete=auto_deletes)
        wish = SetVModel(
            tenant="t",
            id=vmodel,
            target=target,
            created=created if creates else None,
            owner=owner,
            updates_only=updates_only,
            is_forced=is_forced,
            loads_now=loads_now,
            expected_target=expected,
        )
        plan = plan_set(wish, self.vmodels.get(vmodel), self.models, loaded)
        if isinstance(plan, Plan):
            self.write(vmodel, plan)
            now = self.vmodels[vmodel]
            assert now.target == target
            # The same call again finds everything done.
            again = plan_set(replace(wish, owner="", expected_target="", updates_only=True), now, self.models, loaded)
            assert again == Plan(now, {})

    @rule(vmodel=vmodel_ids, loaded=loaded_sets, fails=st.booleans())
    def advance(self, vmodel, loaded, fails) -> None:
        record = self.vmodels.get(vmodel)
        if record is None:
            return
        step = next_step(record, loaded, now_ms=5)
        assert (step is None) == (record.active == record.target)
        if isinstance(step, Flip):
            assert record.target in loaded or record.active not in loaded
            self.write(vmodel, plan_flip(record, record.target, self.models))
            assert next_step(self.vmodels[vmodel], loaded, now_ms=5) is None
        elif step is not None and fails:
            self.write(vmodel, plan_failure(record, record.target, "broken", 9))
            assert self.vmodels[vmodel].active == record.active

    @rule(vmodel=vmodel_ids, owner=owners)
    def delete(self, vmodel, owner) -> None:
        self.write(vmodel, plan_delete(self.vmodels.get(vmodel), owner, self.models))

    @invariant()
    def holds(self) -> None:
        refs = Counter(model for record in self.vmodels.values() for model in models_of(record))
        assert set(refs) <= set(self.models), "no vmodel refers to what is not there"
        for model, record in self.models.items():
            assert record.refs == refs[model]
            assert not (record.auto_delete and record.refs == 0), "an auto-delete model goes with its last reference"


TestVModels = VModels.TestCase
TestVModels.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
