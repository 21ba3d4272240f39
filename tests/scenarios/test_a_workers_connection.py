"""A worker's connection to its queue is a worker's, in an interpreter of its own: the callers' would do less.

Its transport leases what it takes, also after kombu went on to the next of several URLs, as it does when a Sentinel
cannot be reached. Its timeouts are its own, longer than those of a web request.
"""

from __future__ import annotations

from fresh import printed

ENV = {
    "KAFKA_DELIVERY_REDIS_URL": "sentinel://127.0.0.1:1/0;sentinel://127.0.0.1:2/0",
    "KAFKA_DELIVERY_REDIS_OPTIONS": '{"master_name": "mymaster"}',
    "KAFKA_DELIVERY_WORKER_SOCKET_TIMEOUT_S": "7",
}


def test_it_goes_on_with_leases_whichever_sentinel_comes_next() -> None:
    code = """
        from kafka_delivery_worker.application import worker_app
        connection = worker_app().connection_for_read()
        taken = [connection.transport_cls]
        connection.maybe_switch_next()
        print(json.dumps(taken + [connection.transport_cls, connection.clone().transport_cls]))
    """
    assert printed(code, **ENV) == ["kafka_delivery_worker.transport:SentinelTransport"] * 3


def test_it_has_a_workers_timeouts_and_not_the_callers() -> None:
    code = """
        from kafka_delivery_worker.application import worker_app
        conf = worker_app().conf
        options = conf.broker_transport_options
        print(json.dumps([options["socket_timeout"], conf.redis_socket_timeout, conf.task_publish_retry_policy]))
    """
    broker, results, retries = printed(code, **ENV)
    assert (broker, results, retries["max_retries"]) == (7, 7, 3)
