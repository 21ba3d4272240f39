"""What this project overrides of kombu and Celery, method by method, and what each takes there."""

from __future__ import annotations

import inspect
from typing import Any

from celery.backends.redis import RedisBackend
from celery.events.dispatcher import EventDispatcher

from kafka_delivery import base, celery_app, dead_letter, result_backend, send, send_many
from kafka_delivery.delivery import BatchResult
from kafka_delivery_worker import consumer, envelopes, lane, pool, request, transport

OVERRIDDEN = {
    # Of ours: what the same method of kombu or Celery takes; "=" is a default.
    "Message.__init__": "self payload channel= **kwargs",
    "Message.serializable": "self",
    "Message.body": "",
    "Message.ack": "self multiple=",
    "QoS.can_consume": "self",
    "QoS.append": "self message delivery_tag",
    "QoS.ack": "self delivery_tag",
    "QoS.reject": "self delivery_tag requeue=",
    "QoS.restore_unacked": "self client=",
    "QoS.restore_visible": "self start= num= interval=",
    "Channel.__init__": "self *args **kwargs",
    "Channel._create_client": "self asynchronous=",
    "Channel.basic_consume": "self queue *args **kwargs",
    "Channel._queue_bind": "self exchange routing_key pattern queue",
    "Channel._brpop_start": "self timeout=",
    "Channel._brpop_read": "self **options",
    "Channel.close": "self",
    "Transport.register_with_event_loop": "self connection loop",
    "Consumer.__init__": (
        "self on_task_request init_callback= hostname= pool= app= timer= controller= hub= amqheartbeat= "
        "worker_options= disable_rate_limits= initial_prefetch_count= prefetch_multiplier= **kwargs"
    ),
    "Consumer.create_task_handler": "self promise=",
    "Consumer.update_strategies": "self",
    "Consumer.cancel_active_requests": "self",
    "Consumer.on_decode_error": "self message exc",
    "Consumer.on_unknown_message": "self body message",
    "Consumer.on_unknown_task": "self body message exc",
    "Consumer.on_invalid_task": "self body message exc",
    "Request.__init__": (
        "self message on_ack= hostname= eventer= app= connection_errors= request_dict= task= on_reject= body= headers= "
        "decoded= utc= maybe_make_aware= maybe_iso8601= **opts"
    ),
    "Request._announce_revoked": "self reason terminated signum expired",
    "Request.on_failure": "self exc_info send_failed_event= return_ok=",
    "Request.reject": "self requeue=",
    "Request.info": "self safe=",
    "Request.on_retry": "self exc_info",
    "Request.revoked": "self",
    "TaskPool.__init__": "self *args **kwargs",
    "TaskPool.register_with_event_loop": "self loop",
    "TaskPool.on_start": "self",
    "TaskPool.on_apply": "self target args= kwargs= callback= accept_callback= **_",
    "TaskPool.on_stop": "self",
    "TaskPool._get_info": "self",
    "LaneRequest.__init__": (
        "self message on_ack= hostname= eventer= app= connection_errors= request_dict= task= on_reject= body= headers= "
        "decoded= utc= maybe_make_aware= maybe_iso8601= **opts"
    ),
    "LaneRequest.delivery_info": "self",
    "LaneRequest.acknowledge": "self",
    "LaneRequest.terminate": "self pool signal=",
}


OF_CALLERS = {
    # The same of what callers load too, and of what only stands for something of Celery's. What is no method there has
    # no arguments.
    "IsolatedCelery.__init__": (
        "self main= loader= backend= amqp= events= log= control= set_as_current= tasks= broker= include= changes= "
        "config_source= fixups= task_cls= autofinalize= namespace= strict_typing= config_source_silent= **kwargs"
    ),
    "IsolatedCelery.finalize": "self auto=",
    "IsolatedCelery.pool": "self",
    "IsolatedCelery.connection": (
        "self hostname= userid= password= virtual_host= port= ssl= connect_timeout= transport= transport_options= "
        "heartbeat= login_method= failover_strategy= **kwargs"
    ),
    "IsolatedCelery.connection_for_read": "self url= **kwargs",
    "IsolatedCelery.connection_for_write": "self url= **kwargs",
    "IsolatedCelery.backend_cls": "",
    "IsolatedCelery._load_config": "self",
    "IsolatedCelery._after_fork": "self",
    "OneTransport.switch": "self conn_str",
    "IsolatedAMQP.producer_pool": "self",
    "IsolatedAMQP._create_task_sender": "self",
    "Loader.read_configuration": "self env=",
    "DeliveryTask.max_retries": "",
    "DeliveryTask.apply_async": "self args= kwargs= task_id= producer= link= link_error= shadow= **options",
    "DeliveryTask.signature": "self args= *starargs **starkwargs",
    "DeliveryTask.AsyncResult": "self task_id **kwargs",
    "DeliveryTask.__call__": "self *args **kwargs",
    "DeliveryTask.retry": "self args= kwargs= exc= throw= eta= countdown= max_retries= **options",
    "Send.delay": "self *args **kwargs",
    "Send.run": "self *args **kwargs",
    "SendMany.delay": "self *args **kwargs",
    "SendMany.run": "self *args **kwargs",
    "DeadLetter.delay": "self *args **kwargs",
    "DeadLetter.run": "self *args **kwargs",
    "BatchResult.get": (
        "self timeout= propagate= interval= callback= no_ack= on_message= disable_sync_subtasks= on_interval="
    ),
    "_Channel._put": "self queue message",
    "_Channel._size": "self queue",
    "_Transport.__init__": "self client **kwargs",
    "_Chords.client": "",
    "_Chords.on_chord_part_return": "self request state result propagate= **kwargs",
    "_Chords.chord_error_from_stack": "self callback exc=",
    "_Chords._call_task_errbacks": "self request exc traceback",
    "_AnnouncedEvents.send": "self type blind= utcoffset= retry= retry_policy= Event= **fields",
}


STANDS_FOR: dict[type, type] = {lane._AnnouncedEvents: EventDispatcher, result_backend._Chords: RedisBackend}
"""What is handed to Celery in the place of its own, or is part of that, and is not derived from it."""


CLASSES = {
    each.__name__: each
    for each in (
        transport.Message,
        transport.QoS,
        transport.Channel,
        transport.Transport,
        consumer.Consumer,
        request.Request,
        pool.TaskPool,
        lane.LaneRequest,
    )
}


CLASSES_OF_CALLERS = {
    each.__name__: each
    for each in (
        celery_app.IsolatedCelery,
        celery_app.IsolatedAMQP,
        celery_app.OneTransport,
        celery_app.Loader,
        base.DeliveryTask,
        type(send),
        type(send_many),
        type(dead_letter),
        BatchResult,
        envelopes._Channel,
        envelopes._Transport,
        lane._AnnouncedEvents,
        result_backend._Chords,
    )
}


ALL_CLASSES, ALL_OVERRIDDEN = CLASSES | CLASSES_OF_CALLERS, OVERRIDDEN | OF_CALLERS


NOTHING = object()


def upstream(ours: type, name: str) -> Any:
    """The same attribute of the nearest class that is not ours; NOTHING if there is none."""
    for each in STANDS_FOR.get(ours, ours).__mro__[ours not in STANDS_FOR :]:
        if not each.__module__.startswith("kafka_delivery") and each is not object and name in vars(each):
            return vars(each)[name]
    return NOTHING


def parameters(method: Any) -> str:
    marks: dict[int, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    function = method.fget if isinstance(method, property) else method
    if not callable(function):
        return ""
    return " ".join(
        marks.get(p.kind, "") + p.name + ("" if p.default is p.empty else "=")
        for p in inspect.signature(function).parameters.values()
    )
