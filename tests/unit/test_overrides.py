"""What this project overrides of kombu and Celery, and what it uses of them, is still there with the same arguments.

An upgrade that breaks one of these breaks a test here first.
"""

from __future__ import annotations

import inspect
import re

import billiard.pool
import celery.app.amqp
import celery.app.builtins
import pytest
from celery import _state
from celery.app import trace
from celery.app.task import get_actual_ignore_result
from celery.backends import redis as redis_backend
from celery.backends.base import Backend
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.worker import state
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.request import Request as CeleryRequest
from kombu.transport import redis as kombu_redis

from kafka_delivery import app, result_backend, send
from kafka_delivery_worker import lane, transport
from overridden import ALL_CLASSES, ALL_OVERRIDDEN, NOTHING, OVERRIDDEN, STANDS_FOR, parameters, upstream


class TestSignatures:
    def test_every_method_that_is_overridden_is_listed_here(self) -> None:
        found = {
            f"{name}.{method}"
            for name, ours in ALL_CLASSES.items()
            for method, value in vars(ours).items()
            if inspect.isfunction(value) or isinstance(value, property)
            if upstream(ours, method) is not NOTHING and not (ours in STANDS_FOR and method == "__init__")
        }
        assert found == set(ALL_OVERRIDDEN)

    @pytest.mark.parametrize("name", ALL_OVERRIDDEN)
    def test_it_is_still_there_with_the_same_arguments(self, name: str) -> None:
        ours, _, method = name.partition(".")
        found = upstream(ALL_CLASSES[ours], method)
        assert found is not NOTHING
        assert parameters(found) == ALL_OVERRIDDEN[name]

    def test_nothing_of_kombus_is_overridden_by_accident(self) -> None:
        """Names of our own on a channel that kombu uses for something else."""
        own = {"_asked", "_sent", "_quiet_until", "_empty", "_next_due", "_reconciled", "_script_id", "_cached_client"}
        methods = {n for n, v in vars(transport.Channel).items() if inspect.isfunction(v)} - {
            name.partition(".")[2] for name in OVERRIDDEN
        }
        assert (own | methods | {"lease", "_unacknowledged"}) & set(dir(kombu_redis.Channel)) == set()
        assert own <= set(vars(transport.Channel))

    def test_the_strategy_of_a_task_is_where_celery_looks_for_it(self) -> None:
        from celery.app.task import Task
        from celery.worker import strategy

        assert Task.Strategy == "celery.worker.strategy:default"
        assert parameters(strategy.default).split()[:3] == ["task", "app", "consumer"]
        assert parameters(Task.start_strategy) == "self app consumer **kwargs"
        assert send.Strategy == f"{lane.__name__}:{lane.strategy.__name__}"


class TestUsed:
    """What is used of kombu and Celery although it is not theirs to give."""

    def test_attributes_of_celery(self) -> None:
        assert {"reserved_requests", "active_requests", "requests", "revoked", "should_terminate"} <= set(vars(state))
        assert parameters(state.task_reserved).startswith("request ")
        assert parameters(state.task_accepted).startswith("request ")
        assert parameters(state.task_ready).startswith("request successful= ")
        assert isinstance(state.reserved_requests.data, set)
        assert isinstance(state.active_requests.data, set)
        assert parameters(CeleryConsumer.call_soon_ack) == "self p *args **kwargs"
        assert CeleryRequest.acknowledged is False
        assert app.conf.worker_enable_prefetch_count_reduction in (True, False)
        with ThreadPool(1).executor as executor:
            executor.submit(print).result(60)
            assert [thread.is_alive() for thread in executor._threads] == [True]
        assert not any(thread.is_alive() for thread in executor._threads)

    def test_a_lane_leaves_celerys_state_as_celery_does(self) -> None:
        """`lane.begun`, `lane.ended` and `Lane._succeeded` do what these three functions of Celery's do."""
        one, two = (CeleryRequest.__new__(lane.LaneRequest) for _ in range(2))
        one.id, two.id = "one", "two"
        one.name = two.name = send.name
        of_sends = object.__new__(lane.Lane)
        of_sends.task = send
        state.reset_state()
        try:
            lane.begun(one)
            assert ({**state.requests}, {*state.active_requests}) == ({"one": one}, {one})
            lane.ended(one)
            assert (state.requests, len(state.active_requests)) == ({}, 0)
            of_sends._succeeded(1)
            ours = dict(state.total_count), state.all_total_count[0]
            state.reset_state()
            state.task_reserved(two)
            state.task_accepted(two)
            assert ({**state.requests}, {*state.active_requests}) == ({"two": two}, {two})
            assert ours == (dict(state.total_count), state.all_total_count[0]) == ({send.name: 1}, 1)
            lane.ended(two)
            assert (state.requests, len(state.active_requests)) == ({}, 0)
            state.task_accepted(two)
            lane.begun(one)
            state.task_ready(two)
            state.task_ready(one)
            assert (state.requests, len(state.active_requests)) == ({}, 0)
        finally:
            state.reset_state()

    def test_attributes_of_an_app(self) -> None:
        """Of Celery's own, which an isolated one must not change."""
        stranger = celery.Celery("stranger", broker="memory://", set_as_current=False)
        try:
            assert stranger in _state._get_active_apps()
            assert app not in _state._get_active_apps()
        finally:
            _state._deregister_app(stranger)
        assert stranger not in _state._get_active_apps()
        assert isinstance(_state._on_app_finalizers, set)
        own = [each for each in _state._on_app_finalizers if each.__module__ == celery.app.builtins.__name__]
        assert {parameters(each) for each in own} == {"app"}
        for register in own:
            register(stranger)
        assert {"celery.chain", "celery.group", "celery.chord"} <= set(stranger._tasks)
        used = {"_pool", "_preconf", "_pending", "_tasks", "_finalize_mutex", "finalized", "on_after_finalize"}
        assert used <= set(dir(stranger))
        assert parameters(celery.Celery._ensure_after_fork) == "self"
        assert stranger.amqp._producer_pool is None
        assert "backend_cls" in celery.Celery._get_backend.__code__.co_names
        assert callable(celery.Task._get_app)

    def test_what_celery_does_after_a_body(self) -> None:
        """`aftermath` does it before, with the same functions, and leaves nothing of it."""
        source = inspect.getsource(trace)  # not of the function, which other tools replace
        assert re.search(
            r"def _dispatch_callbacks_and_chain\(\s+retval, callbacks, chain, parent_id, root_id, priority,\s+\):",
            source,
        )
        assert parameters(celery.app.amqp.AMQP._retry_publish) == "self publish *args **kwargs"
        assert parameters(get_actual_ignore_result) == "task req"
        assert parameters(Backend.mark_as_done) == "self task_id result request= store_result= state="
        assert parameters(Backend.mark_as_failure) == (
            "self task_id exc traceback= request= store_result= call_errbacks= state="
        )
        assert parameters(Backend.mark_as_retry) == "self task_id exc traceback= request= store_result= state="
        assert isinstance(app.backend, result_backend.RedisBackend)

    def test_what_celery_asks_redis_at_the_end_of_a_chord(self) -> None:
        """`result_backend` reads the answer of this script, and knows which functions handle an error."""
        assert "return {readycount, totaldiff, size, claimed}" in redis_backend.CHORD_PART_RETURN_LUA
        used = {
            "_chord_part_return_script",
            "_chord_cleanup_script",
            "chord_error_from_stack",
            "client",
            "_retry_publish",
        }
        assert used <= set(redis_backend.RedisBackend.on_chord_part_return.__code__.co_names)
        assert "_create_client" in redis_backend.RedisBackend.client.func.__code__.co_names

    def test_what_a_stopping_child_of_prefork_waits_for(self) -> None:
        """It is a global of a module, read each time."""
        limit = "GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT"
        assert isinstance(getattr(billiard.pool, limit), int)
        assert limit in billiard.pool.Worker._ensure_messages_consumed.__code__.co_names
        assert billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_INTERVAL == 0.1
