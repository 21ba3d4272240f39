"""``python -m kafka_delivery_worker.cli`` is ``kafka-delivery``."""

from . import main

main()
